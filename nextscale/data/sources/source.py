"""What a source of images is: all labels at once, encoded images one by one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from nextscale.data.images import ImageLike

TRAIN, HELD_OUT = ("train", "training"), ("validation", "valid", "val", "dev", "test")
"""Names of the splits, as folders and files have them; the first held-out one that exists is used."""


class Source(Protocol):
    """Encoded images by row."""

    where: str
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]
    """Rows of the data set's own split, {"train": ..., "held_out": ...}; {} where it has none."""

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        """Name and encoded image of row i; None when the row holds no image."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the stored images changed, as JSON values; reads no image."""

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """These rows shuffled, as far as the storage allows random access."""


def shuffle_rows(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Rows in random order."""
    return rows[torch.randperm(len(rows), generator=rng)]
