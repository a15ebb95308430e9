"""Check, read and write dataclasses of settings: their JSON form, and overrides. Needs no torch.

Reading is strict: errors name the place of an unknown key or of a value of the wrong type, and the nearest known key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from nextscale.common.digest import check_digest
from nextscale.common.errors import SettingError, UserError
from nextscale.common.reading import read_json
from nextscale.pyramid import Pyramid

T = TypeVar("T")
Scalar = bool | int | float | str | None
"""A JSON value that is neither a list nor a table."""

SEED_RULE = "seed must lie in 0 to 2^63 - 1"
_LARGEST = 10**12
"""Larger whole numbers than this are no sizes or counts; only seeds may be larger."""
_get_hints: Any = functools.cache(typing.get_type_hints)
"""The types of a dataclass's fields, evaluated once: they are text, and evaluating it is slow."""


def is_seed(value: int) -> bool:
    """Whether `SEED_RULE` holds."""
    return 0 <= value < 2**63


def check_fields(part: str, config: Any, rules: dict[str, bool]) -> None:
    """Raise SettingError for the first rule that does not hold; a rule starts with the name of its setting.

    All numbers of the config must be finite, and whole ones at most 10^12. `part`: what the settings are of; empty for
    the options of a command.
    """
    names = tuple(f.name for f in dataclasses.fields(config))
    general = {rule: holds for name in names for rule, holds in _check_size(name, getattr(config, name)).items()}
    for rule, holds in (rules | general).items():
        if not holds:
            name = rule.split()[0].rstrip(",")
            raise SettingError(part, rule, name, getattr(config, name), names)


def _check_size(name: str, value: Any) -> dict[str, bool]:
    """The rules that hold for all numbers."""
    values = value if isinstance(value, tuple | list) else (value,)
    reals = [v for v in values if isinstance(v, float)]
    counts = [v for v in values if isinstance(v, int)]
    finite = all(math.isfinite(v) for v in reals)
    small = name == "seed" or all(abs(v) <= _LARGEST for v in counts)
    return {f"{name} must be finite": finite, f"{name} must be at most 10^12": small}


def check_types(part: str, config: Any) -> None:
    """Raise UserError for a setting of another type than its field; the `__post_init__` of a frozen config calls it.

    Scalars and arrays of numpy and torch become numbers of Python, and lists tuples. A whole number in place of a float
    stays one, as records of runs have it.
    """
    for name, hint in _get_hints(type(config)).items():
        given = getattr(config, name)
        plain = to_plain(given)
        if any(not holds for rule, holds in _check_size(name, plain).items() if "finite" in rule):
            raise SettingError(part, f"{name} must be a finite number", name, given)
        value = _convert(hint, plain, f"{part}.{name}")
        if not (isinstance(given, int) and value == given):
            object.__setattr__(config, name, value)


def to_plain(value: Any) -> Any:
    """A scalar or an array of numpy or torch as numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


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

    Settings that `data` leaves out keep their value in `base`, at every depth. Without a base they get their defaults;
    UserError names those that have none. Numbers must be finite, and integers of up to 64 bits.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table of settings, got {quote_value(data)}")
    hints = _get_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = [f.name for f in fields]
    for key in data:
        if key not in known:
            raise UserError(f"{where} has no setting '{str(key)[:80]}'{suggest_name(str(key), known)}")
    values = {key: _convert(hints[key], v, f"{where}.{key}", getattr(base, key, None)) for key, v in data.items()}
    if base is not None:
        return dataclasses.replace(reset_derived(base), **values)  # type: ignore[type-var]
    absent = [f.name for f in fields if f.name not in data and f.default is f.default_factory is dataclasses.MISSING]
    if absent:
        raise UserError(f"{where} lacks '{absent[0]}'")
    return cls(**values)


def read_record(cls: type[T], path: Path, *, finite: bool = True) -> T:
    """Read a JSON file that this package wrote into dataclass `cls`, whose `__post_init__` checks the ranges.

    Names that `cls` does not have are refused, or collected in its field `other` where it has one. `finite`: as in
    `read_json`. Raises UserError naming the file and the field.
    """
    return parse_record(cls, read_json(path, finite=finite), path)


def parse_record(cls: type[T], data: Any, path: Path, remedy: str = "delete the file") -> T:
    """The content of a JSON file as dataclass `cls`; see `read_record`. A digest in it must match.

    `remedy`: what accepts or mends a file that does not match its digest.
    """
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    fields = data
    if isinstance(data, dict):
        other = {name: value for name, value in data.items() if name not in known and name != "digest"}
        fields = {name: value for name, value in data.items() if name in known}
        fields |= {"other": other} if "other" in known else other
    try:
        record = from_dict(cls, fields, str(path))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error
    if isinstance(data, dict):
        check_digest(path, data, remedy)
    return record


def quote_value(value: Any) -> str:
    """A value as it stands in a message: its Python form, cut to 80 characters."""
    text = repr(value[:100] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    if hint is Any:
        return value
    if hint is Pyramid:
        return _parse_pyramid(value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where, base)
    if origin is dict:
        return {**(base or {}), **_convert_table(arguments[1], value, where)}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        words = [word for a in arguments if typing.get_origin(a) is Literal for word in typing.get_args(a)]
        if value in words:
            return value
        if isinstance(value, str) and words:
            raise UserError(f"{where} is {quote_value(value)}; it must be {' or '.join(words)}, or a number")
        kinds = [a for a in arguments if a is not type(None) and typing.get_origin(a) is not Literal]
        listed = [a for a in kinds if typing.get_origin(a) is tuple] if isinstance(value, list | tuple) else []
        return _convert([*listed, *kinds][0], value, where, base)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise UserError(f"{where} is {quote_value(value)}; it must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    return _convert_scalar(hint, value, where)


def _parse_pyramid(value: Any, where: str) -> Pyramid:
    """A pyramid from text or a list of sides."""
    if not isinstance(value, str | list | tuple):
        raise UserError(f"{where} is {quote_value(value)}; it must list map sides, coarse to fine: [1, 2, 4]")
    try:
        return Pyramid.parse(value) if isinstance(value, str) else Pyramid(tuple(value))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _convert_table(hint: Any, value: Any, where: str) -> dict[str, Any]:
    """A table of names and values of the type `hint`: JSON scalars, or another type."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} must be a table of settings, got {quote_value(value)}")
    if typing.get_origin(hint) is not types.UnionType:
        return {name: _convert(hint, entry, f"{where}.{name}") for name, entry in value.items()}
    for name, entry in value.items():
        if isinstance(entry, float) and not math.isfinite(entry):
            raise UserError(f"{where}.{name} is {entry}; it must be a finite number")
        if entry is not None and not isinstance(entry, str | int | float | bool):
            raise UserError(f"{where}.{name} is {quote_value(entry)}; it must be a number, text, true, false or null")
    return value


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    """A bool, int, float or str. Text that spells a number is accepted for a float: YAML reads 1e-4 as text."""
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        value = float(value)
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is {value}; it must be a finite number")
        if hint is float and abs(value) < 2**1023:
            return float(value)
        if hint is int and value == int(value) and abs(value) < 2**64:
            return int(value)
    kind = getattr(hint, "__name__", None) or "list"
    raise UserError(f"{where} is {quote_value(value)}; it must be {'a list' if kind == 'tuple' else 'of type ' + kind}")
