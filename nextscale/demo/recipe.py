"""The command line and the lines of Python that give the pictures of a request again."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from nextscale.config.classes import quote_name
from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import Request
from nextscale.demo.models import Model

_BATCH = 16
"""The default batch size of `nextscale sample` and `Pipeline.sample`."""


def write_command(model: Model, request: Request) -> str:
    """The `nextscale sample` command; type and device are named, because `auto` may choose others elsewhere."""
    words = ["nextscale", "sample", model.source, "--labels", ",".join(name_labels(model, request.labels))]
    for name, value in list_settings(request.settings).items():
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        words += [option] if value is True else [option, *map(str, values)]
    words += ["--dtype", model.dtype, "--device", str(model.pipeline.device)]
    words += ["--batch-size", str(len(request.labels))] if len(request.labels) > _BATCH else []
    return shlex.join([*words, "--out", "grid.png"])


def write_python(model: Model, request: Request) -> str:
    """The same in Python."""
    settings = "".join(f", {name}={value!r}" for name, value in list_settings(request.settings).items())
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
    return [_name_label(model, label) for label in labels]


def _name_label(model: Model, label: int | None) -> str:
    names = model.config.class_names
    if label is None:
        return '""' if any(name.strip().casefold() == "none" for name in names) else "none"
    if not names:
        return str(label)
    return quote_name(names[label]) if names.count(names[label]) == 1 else str(label)


def list_settings(settings: SampleConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, and the seed."""
    default = SampleConfig()
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {name: v for name, v in values.items() if v != getattr(default, name) or name == "seed"}
