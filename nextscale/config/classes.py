"""What a user may write for a class, and when two names mean the same class. Needs no torch.

A class is written as its name or as its number, counted from 0; `none` means no label. In this order a text is

1. a name exactly as it is known, then a name that differs in case, spaces or Unicode form alone;
2. `none`: no label;
3. a number, unless all names are numbers: then a number is a name, and never a position.

Text in double quotes is a name and nothing else, so `"none"` is the class of this name; `""` is no label. A list has
commas between its entries. Names that contain commas are recognised, and may be quoted. Whatever has two meanings is
refused, with the candidates.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from nextscale.common.errors import UserError
from nextscale.config.labels import check_range

T = TypeVar("T")
_SHOWN = 10


def fold_name(name: str) -> str:
    """The form in which names are compared: without differences of case, Unicode form and spaces."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r" ?, ?", ",", " ".join(text.split()))


def is_number(name: str) -> bool:
    """Whether a name is a whole number."""
    return re.fullmatch(r"[0-9]{1,18}", name) is not None


def list_names(names: Iterable[str], shown: int = _SHOWN) -> str:
    """Names for a message: the first ones, and how many there are in all."""
    every = list(names)
    return ", ".join(every[:shown]) + (f", ... ({len(every)} in all)" if len(every) > shown else "")


def quote_name(name: str) -> str:
    """The name as an entry of a list that means this name alone; in double quotes where it needs them."""
    plain = name == name.strip() and not set(name) & set(',="') and fold_name(name) != "none"
    return name if plain else '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class NameTable:
    """Class names by what a user may write."""

    exact: dict[str, list[int]]
    folded: dict[str, list[int]]
    most_commas: int
    are_numbers: bool
    """Whether there are names and all are numbers."""

    def find(self, text: str) -> list[int]:
        """The classes that a name may mean: those of exactly this name, else those of the same folded name."""
        return self.exact.get(text) or self.folded.get(fold_name(text), [])


@lru_cache(maxsize=16)
def index_names(names: tuple[str, ...]) -> NameTable:
    """The table of these names. A name may occur several times, as `crane` does in ImageNet."""
    exact: dict[str, list[int]] = {}
    folded: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        exact.setdefault(name, []).append(i)
        folded.setdefault(fold_name(name), []).append(i)
    commas = max((name.count(",") for name in names), default=0)
    return NameTable(exact, folded, commas, bool(names) and all(map(is_number, names)))


def find_class(text: str, names: tuple[str, ...], count: int | None) -> int | None:
    """The class that a user wrote as one entry; None for no label.

    `names`: in label order, empty when unknown. `count`: number of classes; None = numbers are not checked. Raises
    UserError when there is no such class, or when several may be meant.
    """
    table, entry = index_names(names), text.strip()
    found = table.exact.get(text) or table.find(entry)
    if fold_name(entry) == "none":
        if found:
            raise UserError(
                f"'{entry}' is both no label and the name of class {found[0]}: write '\"{names[found[0]]}\"' (with the "
                f"double quotes) or {found[0]} for the class, '\"\"' for no label"
            )
        return None
    quoted = not found and _is_quoted(entry)
    if quoted:
        entry = entry[1:-1].replace('""', '"')
        if not entry:
            return None
        found = table.find(entry)
    if len(found) > 1:
        meant = ", ".join(f"'{names[i]}' ({i})" for i in found[:_SHOWN])
        raise UserError(f"'{entry}' may be any of the classes {meant}: write the number, or the name exactly")
    if found:
        return found[0]
    if not quoted and not table.are_numbers and re.fullmatch(r"-?[0-9]{1,18}", entry):
        return check_range(int(entry), count)
    raise UserError(f"there is no class named '{entry}'{_suggest(entry, names)}")


def parse_classes(text: str, names: tuple[str, ...], count: int | None, option: str = "labels") -> list[int | None]:
    """The classes of a list such as `3,cat,none`. `option`: what messages call the list. Otherwise as `find_class`."""
    return parse_entries(text, lambda entry: find_class(entry, names, count), index_names(names), option)


def parse_entries(text: str, resolve: Callable[[str], T], table: NameTable, option: str) -> list[T]:
    """The entries of a list, each as `resolve` reads it; several pieces between commas may be one known name.

    Raises UserError when an entry is empty, when `resolve` does for every way of reading the list, and when there are
    two ways.
    """
    pieces = split_entries(text, option)
    n = len(pieces)
    readings: list[list[tuple[int, T]]] = [[] for _ in pieces]
    """For each piece the entries that begin there: (the piece after the entry, its value)."""
    faults: dict[int, UserError] = {}
    for i in range(n):
        for j in range(i + 1, min(i + 1 + table.most_commas, n) + 1):
            entry = ",".join(pieces[i:j]).strip()
            if j > i + 1 and not _may_be_one(entry, table):
                continue
            try:
                readings[i].append((j, resolve(entry)))
            except UserError as error:
                faults.setdefault(i, error)
    ways = [0] * n + [1]
    for i in reversed(range(n)):
        ways[i] = min(2, sum(ways[j] for j, _ in readings[i]))
    values, i, reached = list[T](), 0, {0}
    if not ways[0]:
        for i in range(n):
            if i in reached and not readings[i]:
                raise faults[i]
            reached |= {j for j, _ in readings[i]} if i in reached else set()
    while i < n:
        possible = [(j, value) for j, value in readings[i] if ways[j]]
        if len(possible) > 1:
            meant = " or ".join(f"'{','.join(pieces[i:j]).strip()}'" for j, _ in possible)
            raise UserError(f"{option} '{text}' can be read in two ways: {meant}? Put names in double quotes")
        i, value = possible[0]
        values.append(value)
    return values


def _may_be_one(entry: str, table: NameTable) -> bool:
    """Whether several pieces together end in a known name: `tench, Tinca tinca`, or `mine=tench, Tinca tinca`."""
    return bool(table.find(entry) or table.find(entry.partition("=")[2].strip()))


def split_entries(text: str, option: str) -> list[str]:
    """The pieces between commas, as they are; commas in double quotes do not count. UserError for an empty piece."""
    pieces, current, quoted, i = list[str](), "", False, 0
    while i < len(text):
        character, width = text[i], 1
        if quoted and text[i : i + 2] == '""':  # one double quote of a quoted name
            width = 2
        elif character == '"' and (quoted or not current.strip() or current.rstrip().endswith("=")):
            quoted = not quoted
        if character == "," and not quoted:
            pieces.append(current)
            current = ""
        else:
            current += text[i : i + width]
        i += width
    pieces.append(current)
    if quoted:
        raise UserError(f"{option} '{text}' has a double quote that is not closed")
    if not all(piece.strip() for piece in pieces):
        raise UserError(f"{option} '{text}' has an empty entry; write numbers or names separated by commas: 3,7")
    return pieces


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', "")


def _suggest(text: str, names: Sequence[str]) -> str:
    """A hint for a text that names no class."""
    if not names:
        return "; this checkpoint has no class names, use numbers"
    if is_number(fold_name(text)) and all(map(is_number, names)):
        return f": the names are numbers, so a number means a name; known: {list_names(names)}"
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    close = close or [name for name in names if fold_name(text) in fold_name(name)][:1]
    return f"; did you mean '{close[0]}'?" if close else f"; known: {list_names(names)}"
