"""Read JSON strictly. No other module parses JSON."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError

_LARGEST = 2**26
_DEEPEST = 40


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Parse a JSON file of up to 64 MiB.

    Raises UserError naming the file when it is absent or as `parse_json` does.
    """
    return parse_json(read_text(path, _LARGEST), str(path), finite=finite)


def parse_json(text: str | bytes, where: str, *, finite: bool = True) -> Any:
    """The value of a JSON text; UserError starting with `where` when it is not sound.

    Besides what JSON forbids, refuses a name that stands twice in a table, nesting of more than 40 levels, integers of
    more than 64 bits and, unless `finite` is False, NaN and infinite numbers (logs and measurements may have them).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        hooks: dict[str, Any] = {"parse_float": _parse_finite, "parse_constant": _refuse_constant} if finite else {}
        value = json.loads(text, object_pairs_hook=_make_table, parse_int=_parse_integer, **hooks)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed or written
    except RecursionError:
        raise UserError(f"cannot read {where}: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"cannot read {where}: {error}") from error
    if _is_deeper(value, _DEEPEST):
        raise UserError(f"cannot read {where}: it is nested too deeply")
    return value


def read_text(path: Path, largest: int) -> str:
    """The text of a regular file of up to so many bytes; UserError naming the file when it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot read {path}: it is no regular file")
        size = path.stat().st_size
        if size > largest:
            raise UserError(f"cannot read {path}: it has {size:,} bytes, more than {largest:,}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: byte {error.start} is no UTF-8 text") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a null character in the path
        raise UserError(f"cannot read {path}: {error}") from error


def has_format(folder: Path, name: str) -> bool:
    """Whether the folder's config.json names this format (its key "format")."""
    try:
        head = read_json(folder / "config.json")
    except UserError:
        return False
    return isinstance(head, dict) and head.get("format") == name


def is_hub_name(text: str) -> bool:
    """Whether a text has the form owner/name of a repository on the Hugging Face hub."""
    return re.match(r"^[\w.-]+/[\w.-]+$", text) is not None


def _make_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name[:80]!r} stands twice in a table")
        table[name] = value
    return table


def _parse_integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**64:
        raise ValueError(f"{text[:20]}... is no integer of 64 bits")
    return int(text)


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether tables and lists are nested in more than so many levels."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inner = (part for outer in layer for part in (outer.values() if isinstance(outer, dict) else outer))
        layer = [part for part in inner if isinstance(part, dict | list)]
    return bool(layer)
