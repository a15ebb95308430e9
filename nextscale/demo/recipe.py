"""The command line and the lines of Python that give the pictures of a request again."""

from __future__ import annotations

import shlex

from nextscale.config.usage import write_arguments, write_label, write_options
from nextscale.demo.growth import Request
from nextscale.demo.models import Asked, Model

_BATCH = 16
"""The default batch size of `nextscale sample` and `Pipeline.sample`."""


def write_command(model: Model, request: Request) -> str:
    """The `nextscale sample` command; type and device are named, because `auto` may choose others elsewhere."""
    if model.reads_text:
        asked = ["--prompt", *(str(text or "") for text in request.asked)]
    else:
        asked = ["--labels", ",".join(name_labels(model, request.asked))]
    words = ["nextscale", "sample", model.source, *asked]
    words += [*write_options(request.settings), "--dtype", model.dtype, "--device", str(model.pipeline.device)]
    words += ["--batch-size", str(len(request.asked))] if len(request.asked) > _BATCH else []
    return shlex.join([*words, "--out", "grid.png"])


def write_python(model: Model, request: Request) -> str:
    """The same in Python."""
    settings = f", {write_arguments(request.settings)}"
    batch = f", batch_size={len(request.asked)}" if len(request.asked) > _BATCH else ""
    how = f"dtype={model.dtype!r}, device={str(model.pipeline.device)!r}"
    if model.reads_text:
        asked = f"prompts={[text or '' for text in request.asked]}"
    else:
        asked = repr(",".join(name_labels(model, request.asked)))
    lines = [
        "from nextscale import Pipeline",
        "",
        f"pipeline = Pipeline.from_pretrained({model.source!r}, {how})",
        f"images = pipeline.sample({asked}{settings}{batch})",
        'images.save("grid.png")',
    ]
    return "\n".join(lines)


def name_labels(model: Model, labels: tuple[Asked, ...]) -> list[str]:
    """Each class by its name where that means this class alone, else by its number; `none` for no label."""
    names = model.config.class_names
    return [write_label(None if label is None else int(label), names) for label in labels]
