"""Check, read and write dataclasses of settings: their JSON form, and overrides. Needs no torch.

Reading is strict: errors name the place of an unknown key or of a value of the wrong type, and the nearest known key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from nextscale.common.errors import UserError
from nextscale.pyramid import Pyramid

T = TypeVar("T")
Scalar = bool | int | float | str | None
"""A JSON value that is neither a list nor a table."""


def check_fields(part: str, config: Any, rules: dict[str, bool]) -> None:
    """Raise UserError for the first rule that does not hold; a rule starts with the name of its setting."""
    for rule, holds in rules.items():
        if not holds:
            name = rule.split()[0].rstrip(",")
            raise UserError(f"{part}: {rule}; got {name}={getattr(config, name)}")


def to_dict(config: Any) -> Any:
    """The JSON form of a config: nested dicts and lists. A pyramid becomes its list of [h, w] sides."""
    if isinstance(config, Pyramid):
        return [list(side) for side in config.sides]
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    return [to_dict(v) for v in config] if isinstance(config, tuple | list) else config


def from_dict(cls: type[T], data: Any, where: str = "config", base: T | None = None) -> T:
    """Build dataclass `cls` from parsed JSON or YAML. Raises UserError naming the place of an unknown key or value.

    Settings that `data` leaves out keep their value in `base`, at every depth. Without a base they get their defaults.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table of settings, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UserError(f"{where} has no setting '{key}'{suggest_name(str(key), known)}")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}", getattr(base, key, None)) for key, value in data.items()
    }
    return cls(**values) if base is None else dataclasses.replace(reset_derived(base), **values)  # type: ignore[type-var]


def reset_derived(config: T) -> T:
    """The config with derived fields set back to 0, at every depth, so that they are derived again from changed fields.

    A config lists its derived fields and their values in `derived()`. Fields with other values are left as they are.
    """
    out = copy.copy(config)
    derived = config.derived() if hasattr(config, "derived") else {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Pyramid):
            object.__setattr__(out, f.name, reset_derived(value))
        elif f.name in derived and value == derived[f.name]:
            object.__setattr__(out, f.name, 0)
    return out


def suggest_name(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, base: Any = None) -> Any:
    """`value` as the type `hint`, or a UserError that says where it stands."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Pyramid:
        if not isinstance(value, str | list | tuple):
            raise UserError(f"{where} is {value!r}; it must list map sides, coarse to fine: [1, 2, 4]")
        return Pyramid.parse(value) if isinstance(value, str) else Pyramid(tuple(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where, base)
    if origin is dict:
        return {**(base or {}), **_scalars(value, where)}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        listed = [a for a in kinds if typing.get_origin(a) is tuple] if isinstance(value, list | tuple) else []
        return _convert([*listed, *kinds][0], value, where, base)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, where)


def _scalars(value: Any, where: str) -> dict[str, Scalar]:
    """A table of names and JSON scalars."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} must be a table of settings, got {value!r}")
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, str | int | float | bool):
            raise UserError(f"{where}.{name} is {entry!r}; it must be a number, text, true, false or null")
    return value


def _scalar(hint: Any, value: Any, where: str) -> Any:
    """A bool, int, float or str. YAML reads 1e-4 as a string, so strings that spell a number are accepted."""
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float:
                return number
            if number == int(number):
                return int(value)
        except (ValueError, OverflowError):
            pass
    kind = getattr(hint, "__name__", None) or "list"
    raise UserError(f"{where} is {value!r}; it must be {'a list' if kind == 'tuple' else 'of type ' + kind}")
