"""scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.common.extras import import_extra
from nextscale.data.images import ImageLike
from nextscale.data.sources.captions import Captions
from nextscale.data.sources.source import Unused, shuffle_rows


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels with 17 grey levels."""

    size: int
    where: str = "digits"
    class_names: tuple[str, ...] = tuple(map(str, range(10)))
    splits: dict[str, list[int]] = field(default_factory=dict)
    unused: Unused = field(default_factory=Unused)
    captions: Captions | None = None

    def __post_init__(self) -> None:
        self._pixels, labels = _load_digits()
        self.labels = list(labels)

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        scan = Image.fromarray(self._pixels[i])
        return f"digit {i}", scan.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "digits", "size": self.size}

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


@lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, tuple[int, ...]]:
    """Pixels (1797, 8, 8), uint8, and labels. scikit-learn reads them from text each time, in a tenth of a second."""
    digits = import_extra("sklearn.datasets", "reading the bundled digits").load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), tuple(digits.target.tolist())
