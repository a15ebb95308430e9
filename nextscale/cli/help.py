"""Short help: of a command with many options, `--help` shows those that matter and `--help-all` shows all.

A command lists the options that matter in its class attribute `main_options`, as they are typed and without the dashes.
The others are hidden from the short help only: they are accepted as always.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.conf import Suppress

HELP = {"-h", "--help", "--help-all"}


def hide_options(kind: type, defaults: Any) -> tuple[type, Any, str]:
    """A command that shows its main options only: (type, default, a paragraph that says how to see the others).

    `defaults`: the command with its default settings, or None. Nothing changes for a command without `main_options`.
    """
    main: tuple[str, ...] = getattr(kind, "main_options", ())
    if not main:
        return kind, defaults, ""
    if defaults is None:
        defaults = kind(**dict.fromkeys(list_required(kind), tyro.MISSING))
    hint = (
        f"\n\nThese options matter most. `nextscale {{name}} --help-all` shows {count_options(kind) - len(main)} more."
    )
    shown = _hide(defaults, {name.replace("-", "_") for name in main}, "")
    return type(shown), shown, hint


def list_required(kind: type) -> list[str]:
    """The fields of a command that have no default."""
    return [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory]  # both are "missing"


def count_options(kind: type) -> int:
    """The number of options of a command or of a table of settings."""
    hints: dict[str, Any] = get_type_hints(kind)
    tables = [hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])]
    return len(dataclasses.fields(kind)) - len(tables) + sum(count_options(table) for table in tables)


def _hide(config: Any, shown: set[str], at: str) -> Any:
    """A copy whose class marks each field as hidden, unless it is or contains a shown option."""
    kind, out = type(config), copy.copy(config)
    hints, annotations = get_type_hints(kind, include_extras=True), dict[str, Any]()
    for f in dataclasses.fields(kind):
        name, hint, value = f"{at}{f.name}", hints[f.name], getattr(config, f.name)
        inner = at if f.name == "settings" else f"{name}."
        if dataclasses.is_dataclass(value) and any(option.startswith(inner) for option in shown):
            table = _hide(value, shown, inner)
            object.__setattr__(out, f.name, table)
            extras = getattr(hint, "__metadata__", ())
            annotations[f.name] = Annotated[(type(table), *extras)] if extras else type(table)
        else:
            annotations[f.name] = hint if name in shown else Annotated[hint, Suppress]
    names = {"__annotations__": annotations, "__module__": kind.__module__, "__doc__": kind.__doc__}
    object.__setattr__(out, "__class__", type(kind.__name__, (kind,), names))
    return out
