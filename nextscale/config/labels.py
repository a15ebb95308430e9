"""Labels of a Python caller as class numbers. Needs no torch.

Class names are read by `nextscale.config.classes`, which numbers do not need.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from nextscale.common.errors import UserError


def index_labels(labels: Any, names: tuple[str, ...], count: int | None) -> list[int | None]:
    """Labels of a Python caller as class numbers: of a text as `parse_classes` reads it, of one label, or of several.

    A label is a name (as `find_class` reads it), a whole number of any library, or None for no label.
    """
    if isinstance(labels, str):
        from nextscale.config.classes import parse_classes

        return parse_classes(labels, names, count)
    return [_index_label(label, names, count) for label in list_labels(labels)]


def list_labels(labels: Any) -> list[Any]:
    """One label, or several of any library, as a list. UserError for what has no order, such as a set."""
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(given, bytes | bytearray | Mapping | Set):
        raise UserError(f"labels are one label or a list of them; got {type(given).__name__} {given!r:.60}")
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _index_label(label: Any, names: tuple[str, ...], count: int | None) -> int | None:
    value = label.tolist() if hasattr(label, "tolist") else label
    if value is None:
        return None
    if isinstance(value, str):
        from nextscale.config.classes import find_class

        return find_class(value, names, count)
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value is no class")
        return check_range(operator.index(value), count)
    except TypeError:
        raise UserError(f"a label is a class name, a whole number or None; got {value!r}") from None


def check_range(number: int, count: int | None) -> int:
    """The number of a class; UserError when there is none of this number."""
    if count is not None and not 0 <= number < count:
        raise UserError(f"label {number} is out of range: this model has {count} classes, 0 to {count - 1}")
    return number
