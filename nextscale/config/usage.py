"""Labels and settings of sampling as the words of a command, and as arguments in Python. Needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from nextscale.config.classes import quote_name
from nextscale.config.sampling import SampleConfig


def write_label(label: int | None, names: tuple[str, ...]) -> str:
    """A class by its name where that means this class alone, else by its number; `none` for no label."""
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


def write_options(settings: SampleConfig) -> list[str]:
    """`list_settings` as words of a command: --cfg 2.0 --seed 0."""
    words = []
    for name, value in list_settings(settings).items():
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        words += [option] if value is True else [option, *map(str, values)]
    return words


def write_arguments(settings: SampleConfig) -> str:
    """`list_settings` as arguments in Python: cfg=2.0, seed=0."""
    return ", ".join(f"{name}={value!r}" for name, value in list_settings(settings).items())
