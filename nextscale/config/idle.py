"""Settings that have no effect because of other settings, and settings that are probably not meant. Needs no torch.

A config says so itself, in two methods that it may have:

    list_idle(self) -> dict[str, tuple[str, ...]]    reason: names of fields that have no effect for this reason
    list_doubts(self) -> list[str]                   sentences about values under which something learns or does nothing

Names may be dotted (train.label_drop) or name a whole table (moco). `{at}` in a text stands for the place of the
config among the options, such as "train.".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.parse import reset_derived

Idle = dict[str, tuple[str, ...]]
"""Reason, and the names of the settings that have no effect for this reason."""
_MISSING = object()


def list_setting_notes(config: Any, at: str = "") -> list[str]:
    """Sentences about settings of `config` that have no effect, or under which something learns nothing.

    Looks at every depth. A setting without effect is named only when its value differs from the default. `at`: the
    place of `config` among the options, such as "train.".
    """
    return _list_notes(config, _build_defaults(config), at)


def print_setting_notes(config: Any) -> None:
    """Print what `list_setting_notes` finds, one line each."""
    for note in list_setting_notes(config):
        print(f"note: {note}", flush=True)


def check_steps(config: Any, before: Any, at: str = "") -> None:
    """Raise UserError for a number of steps that was given on the command line but that `epochs` overrules.

    `before`: the settings before the options of the command line. Looks at every depth.
    """
    given = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(before, f.name)}
    if "steps" in given and "epochs" not in given and getattr(config, "epochs", False):
        raise UserError(
            f"--{at}steps has no effect, because the settings have {at}epochs {config.epochs:g}: give --{at}epochs 0, "
            f"too, or another --{at}epochs".replace("_", "-")
        )
    for name in given:
        if dataclasses.is_dataclass(getattr(config, name)) and dataclasses.is_dataclass(getattr(before, name)):
            check_steps(getattr(config, name), getattr(before, name), f"{at}{name}.")


def list_differences(config: Any, other: Any, at: str) -> list[str]:
    """Names of the settings, at every depth, whose values differ between two configs of one type."""
    if not dataclasses.is_dataclass(config) or not dataclasses.is_dataclass(other):
        return [] if config == other else [at.rstrip(".")]
    differences: list[str] = []
    for f in dataclasses.fields(config):
        differences += list_differences(getattr(config, f.name), getattr(other, f.name), f"{at}{f.name}.")
    return differences


def describe_idle(names: list[str], reason: str) -> str:
    """ "train.ema has no effect: ..."; at most eight names."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more} {'has' if len(names) == 1 else 'have'} no effect: {reason}"


def _list_notes(config: Any, defaults: Any, at: str) -> list[str]:
    plain, notes, named = reset_derived(config), [], set[str]()
    idle: Idle = config.list_idle() if hasattr(config, "list_idle") else {}
    for reason, names in idle.items():
        pairs = [(_get(plain, name), _get(defaults, name), f"{at}{name}.") for name in names]
        changed = [found for pair in pairs for found in list_differences(*pair) if found not in named]
        named |= set(changed)
        if changed:
            notes.append(describe_idle(changed, reason.replace("{at}", at)))
    if hasattr(config, "list_doubts"):
        notes += [doubt.replace("{at}", at) for doubt in config.list_doubts()]
    unused = {name for names in idle.values() for name in names}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value) and f.name not in unused:
            inner = "" if f.name == "settings" else f"{f.name}."
            notes += [n for n in _list_notes(value, getattr(defaults, f.name), f"{at}{inner}") if n not in notes]
    return notes


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


class _Defaults:
    """The default values of a config's fields; a field without one has a value that nothing equals."""


def _build_defaults(config: Any) -> Any:
    defaults = _Defaults()
    for f in dataclasses.fields(config):
        value = f.default if f.default is not dataclasses.MISSING else _MISSING
        if f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        setattr(defaults, f.name, reset_derived(value) if dataclasses.is_dataclass(value) else value)
    return defaults
