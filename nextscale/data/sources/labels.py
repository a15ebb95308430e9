"""Classes of labels that come from several tables: matched by their names, never by their numbers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.classes import list_names
from nextscale.data.sources.source import HELD_OUT, TRAIN, MissingColumnError, Unused

NO_LABEL = -1
"""What stands for "no label" in tables whose labels are numbers of classes (the hub's test splits)."""


@dataclass
class TableLabels:
    """The labels of one file."""

    where: str
    split: str
    values: list[Any]
    """A number, a text or None (no label) for each row."""
    names: tuple[str, ...] = ()
    """Names of the classes 0, 1, ... where the file has them."""
    column: str = "label"


def name_classes(tables: Sequence[TableLabels], unused: Unused) -> tuple[tuple[str, ...], list[list[int | None]]]:
    """(class names, for each table the class of each row; None = the row has no label).

    With names, a number counts in its own table's names, and classes of several tables are matched by name. Without,
    the classes are the distinct values in order. Adds rows without labels to `unused`. Raises UserError when numbers
    and texts, or numbers with and without names, would have to be matched, when a number has no name, or when no row
    has a label.
    """
    for table in tables:
        table.values = [_clean(value, table) for value in table.values]
    _drop_markers(tables)
    labelled = [table for table in tables if any(value is not None for value in table.values)]
    if not labelled:
        raise MissingColumnError(
            "",
            f"{tables[0].where}: column '{tables[0].column}' must hold a whole number or a text in every row that has "
            "a label, and there must be such rows",
        )
    for table in tables:
        missing = sum(value is None for value in table.values)
        unused.add("rows without a label", table.split, table.where, missing)
    _check_kinds(labelled)
    if any(table.names for table in labelled):
        return _match_names(tables, labelled, unused)
    values = sorted({value for table in labelled for value in table.values if value is not None})
    number = {value: i for i, value in enumerate(values)}
    return tuple(map(str, values)), [[None if v is None else number[v] for v in t.values] for t in tables]


def _clean(value: Any, table: TableLabels) -> int | str | None:
    """The label as a number or a text; None where there is none."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None or isinstance(value, int):
        return value
    raise UserError(
        f"{table.where}: column '{table.column}' must hold a whole number or a text in every row; a row has {value!r}"
    )


def _drop_markers(tables: Sequence[TableLabels]) -> None:
    """Replace -1 by None where it says that there is no label.

    That is so in tables with names; in a split that has nothing else; and where numbers otherwise start at 0. Elsewhere
    (attributes of -1 and 1) it is a class.
    """
    numbers = {value for table in tables for value in table.values if isinstance(value, int)}
    by_split: dict[str, set[Any]] = {}
    for table in tables:
        by_split.setdefault(table.split, set()).update(value for value in table.values if value is not None)
    for table in tables:
        alone = by_split[table.split] == {NO_LABEL} and len(by_split) > 1
        if table.names or alone or {NO_LABEL, 0} <= numbers:
            table.values = [None if _is_marker(value) else value for value in table.values]


def _is_marker(value: Any) -> bool:
    return isinstance(value, int) and value == NO_LABEL


def is_marked_text(values: Iterable[str]) -> bool:
    """Whether the text -1 stands for "no label" among these labels of a table of text: all are numbers, from 0."""
    distinct = set(values)
    return {"-1", "0"} <= distinct and all(value == "-1" or value.isdigit() for value in distinct)


def _check_kinds(tables: Sequence[TableLabels]) -> None:
    """Raise UserError when tables hold labels that cannot be matched without a guess."""
    kinds: dict[str, TableLabels] = {}
    for table in tables:
        value = next(value for value in table.values if value is not None)
        kind = (
            "texts" if isinstance(value, str) else "names" if table.names
            else "truth values" if isinstance(value, bool) else "numbers without names"
        )  # fmt: skip
        kinds.setdefault(kind, table)
    if len(kinds) > 1 and set(kinds) != {"texts", "names"}:
        (one, first), (two, second) = list(kinds.items())[:2]
        raise UserError(
            f"column '{first.column}' of {first.where} holds {one}, that of {second.where} holds {two}: their classes "
            "cannot be matched; make the labels of all files alike, or read the files one by one"
        )


def _match_names(
    tables: Sequence[TableLabels], labelled: Sequence[TableLabels], unused: Unused
) -> tuple[tuple[str, ...], list[list[int | None]]]:
    """As `name_classes`, where tables have names: theirs in the order of the first table, then those of the others."""
    number: dict[str, int] = {}
    lists: dict[tuple[str, ...], str] = {}
    for table in tables:
        if table.names:
            lists.setdefault(table.names, table.where)
            for name in table.names:
                number.setdefault(name, len(number))
    for names, where in lists.items():
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(f"{where} names several classes alike ({list_names(twice)}): they cannot be told apart")
    if len(lists) > 1:
        (one, where), (two, other) = list(lists.items())[:2]
        unused.remark(
            f"{where} and {other} number their classes differently ({list_names(one)}; {list_names(two)}): classes are "
            "matched by name"
        )
    first = {names: _find_first_number(names, labelled, unused) for names in lists}
    return tuple(number), [[_match_value(v, table, first, number) for v in table.values] for table in tables]


def _find_first_number(names: tuple[str, ...], tables: Sequence[TableLabels], unused: Unused) -> int:
    """0, or 1 where the numbers of all tables with these names plainly count from 1."""
    numbers = {v for table in tables if table.names == names for v in table.values if isinstance(v, int)}
    if numbers and min(numbers) >= 1 and max(numbers) == len(names):
        unused.remark(f"labels run from 1 to {len(names)}, the number of names: label 1 is taken as {names[0]}")
        return 1
    return 0


def _match_value(
    value: int | str | None, table: TableLabels, first: dict[tuple[str, ...], int], number: dict[str, int]
) -> int | None:
    """The class of a label."""
    if value is None:
        return None
    if isinstance(value, str):
        if value not in number:
            raise UserError(f"{table.where} has the label '{value}'; the classes are {list_names(list(number))}")
        return number[value]
    index = value - first[table.names]
    if not 0 <= index < len(table.names):
        raise UserError(
            f"{table.where} has the label {value} in column '{table.column}', but names of {len(table.names)} classes, "
            f"0 to {len(table.names) - 1}"
        )
    return number[table.names[index]]


@dataclass(frozen=True)
class LabelledRows:
    """The rows of several tables that have a label."""

    class_names: tuple[str, ...]
    rows: list[int]
    """Their numbers among all rows."""
    labels: list[int]
    splits: dict[str, list[int]]
    """As in `Source`."""


def arrange_tables(tables: Sequence[TableLabels], where: str, unused: Unused) -> LabelledRows:
    """The labelled rows of tables in their order, with the classes of `name_classes` and the split of their files."""
    class_names, classes = name_classes(tables, unused)
    rows: list[int] = []
    labels: list[int] = []
    rows_by_split: dict[str, list[int]] = {}
    start = 0
    for table, numbers in zip(tables, classes, strict=True):
        first = len(rows)
        rows += [start + row for row, number in enumerate(numbers) if number is not None]
        labels += [number for number in numbers if number is not None]
        start += len(numbers)
        if len(rows) > first:
            rows_by_split.setdefault(table.split, []).extend(range(first, len(rows)))
    return LabelledRows(class_names, rows, labels, _choose_splits(rows_by_split, where, unused))


def parse_split(name: str) -> str:
    """The split in a file's name, as in train-00000-of-00004.parquet or data/test/0.parquet; "" where it has none."""
    words = re.split(r"[/\\._-]", name.lower())
    if any(word in TRAIN for word in words):
        return TRAIN[0]
    return next((split for split in HELD_OUT if split in words), "")


def _choose_splits(rows_by_split: dict[str, list[int]], where: str, unused: Unused) -> dict[str, list[int]]:
    """The training and the held-out rows, where the names of all files tell them apart."""
    train, held_out = TRAIN[0], next((split for split in HELD_OUT if split in rows_by_split), None)
    if held_out is None or train not in rows_by_split:
        return {}
    if "" in rows_by_split:
        count = len(rows_by_split[""])
        unused.remark(f"{where}: {count} images are in files that name no split, so all files are one set")
        return {}
    further = [f"{name} ({len(rows)} images)" for name, rows in rows_by_split.items() if name not in (train, held_out)]
    if further:
        unused.remark(f"{where}: {held_out} is held out in training; {', '.join(further)} is in neither part")
    return {"train": rows_by_split[train], "held_out": rows_by_split[held_out]}
