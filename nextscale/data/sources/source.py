"""What a source of images is: all labels at once, encoded images one by one, and what of the data is not used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.classes import list_names
from nextscale.data.images import ImageLike

if TYPE_CHECKING:
    from nextscale.data.sources.captions import Captions

TRAIN, HELD_OUT = ("train", "training"), ("validation", "valid", "val", "dev", "test")
"""Names of the splits, as folders and files have them, in any case; the first held-out one that exists is used."""
_SHOWN = 5


class MissingColumnError(UserError):
    """A data set lacks a column that was asked for, or labels."""

    def __init__(self, option: str, message: str):
        """`option`: the field of `ReadConfig` that asks for the column; "" when labels are missing altogether."""
        super().__init__(message)
        self.option = option


class Source(Protocol):
    """Encoded images by row."""

    where: str
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]
    """Rows of the data set's own split, {"train": ..., "held_out": ...}; {} where it has none."""
    unused: Unused
    """What of the data is not used, and how it was understood where that is not plain."""
    captions: Captions | None
    """Those of all rows; None where they were not asked for."""

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        """Name and encoded image of row i; None when the row holds no image. UserError when it cannot be found."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the stored images changed, as JSON values; reads no image."""

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """These rows shuffled, as far as the storage allows random access."""


@dataclass
class Unused:
    """Files or rows that a source leaves out, by reason and class, and remarks on how the data was understood."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Numbers by reason, then by class, split or folder ("" = none)."""
    examples: dict[str, str] = field(default_factory=dict)
    """One name for each reason."""
    remarks: list[str] = field(default_factory=list)

    def add(self, reason: str, part: str, example: str, count: int = 1) -> None:
        """Count things of a class, split or folder `part` that are left out for a reason."""
        if count:
            self.counts.setdefault(reason, Counter())[part] += count
            self.examples.setdefault(reason, example)

    def update(self, other: Unused) -> None:
        """Add what another one has."""
        for reason, parts in other.counts.items():
            self.counts.setdefault(reason, Counter()).update(parts)
            self.examples.setdefault(reason, other.examples[reason])
        self.remarks += other.remarks

    def remark(self, text: str) -> None:
        """Record one line on how the data was understood."""
        self.remarks.append(text)

    def format_lines(self) -> list[str]:
        """One line for each reason, and the remarks."""
        lines = []
        for reason, parts in self.counts.items():
            named = [f"{part} {count}" for part, count in sorted(parts.items()) if part]
            more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
            by_part = f" ({', '.join(named[:_SHOWN])}{more})" if named else ""
            lines.append(f"not used: {parts.total()} {reason}{by_part}, such as {self.examples[reason]}")
        return [*self.remarks, *lines]


def check_classes(source: Source) -> None:
    """Raise UserError when a class has no images, in the whole set or in one part of its split."""
    for part, rows in (source.splits or {"": []}).items():
        present = {source.labels[row] for row in rows} if part else set(source.labels)
        absent = [name for number, name in enumerate(source.class_names) if number not in present]
        if absent:
            place = f" in its {part.replace('_', '-')} part" if part else ""
            raise UserError(
                f"{source.where} has no images of {list_names(absent)}{place}: remove the class or add images, or give "
                "--images.allow-empty-classes"
            )


def shuffle_rows(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Rows in random order."""
    return rows[torch.randperm(len(rows), generator=rng)]
