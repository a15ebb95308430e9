"""The command line and the lines of Python that give the pictures of a request again."""

from __future__ import annotations

import shlex

from nextscale.config.usage import write_arguments, write_label, write_options
from nextscale.demo.growth import Request
from nextscale.demo.models import Model

_BATCH = 16
"""The default batch size of `nextscale sample` and `Pipeline.sample`."""


def write_command(model: Model, request: Request) -> str:
    """The `nextscale sample` command; type and device are named, because `auto` may choose others elsewhere."""
    words = ["nextscale", "sample", model.source, "--labels", ",".join(name_labels(model, request.labels))]
    words += [*write_options(request.settings), "--dtype", model.dtype, "--device", str(model.pipeline.device)]
    words += ["--batch-size", str(len(request.labels))] if len(request.labels) > _BATCH else []
    return shlex.join([*words, "--out", "grid.png"])


def write_python(model: Model, request: Request) -> str:
    """The same in Python."""
    settings = f", {write_arguments(request.settings)}"
    batch = f", batch_size={len(request.labels)}" if len(request.labels) > _BATCH else ""
    how = f"dtype={model.dtype!r}, device={str(model.pipeline.device)!r}"
    lines = [
        "from nextscale import Pipeline",
        "",
        f"pipeline = Pipeline.from_pretrained({model.source!r}, {how})",
        f"images = pipeline.sample({','.join(name_labels(model, request.labels))!r}{settings}{batch})",
        'images.save("grid.png")',
    ]
    return "\n".join(lines)


def name_labels(model: Model, labels: tuple[int | None, ...]) -> list[str]:
    """Each class by its name where that means this class alone, else by its number; `none` for no label."""
    return [write_label(label, model.config.class_names) for label in labels]
