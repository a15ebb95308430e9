"""Captions of images: texts in natural language, one or several for each image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_bytes
from nextscale.data.sources.source import Unused

CAPTION_COLUMNS = ("caption", "captions", "text")
"""Names of columns with captions, in this order, where none is asked for."""
CAPTION_SUFFIX = ".txt"
"""Of a file beside an image, with a caption in each line."""


class Captions:
    """The captions of images, one or several each. An image without one has the empty caption "".

    They are held as UTF-8 in one array, because a Python text for each takes several times the memory.
    """

    def __init__(self, text_U: np.ndarray, length_C: np.ndarray, count_N: np.ndarray):
        """`text_U`: the bytes of all captions, uint8. `length_C`: bytes of each caption. `count_N`: captions of each
        image, 1 or more. `first_N`: number of each image's first caption."""
        self.text_U, self.length_C, self.count_N = text_U, length_C.astype(np.int64), count_N.astype(np.int64)
        self._start_C = np.cumsum(self.length_C) - self.length_C
        self.first_N = np.cumsum(self.count_N) - self.count_N

    @staticmethod
    def from_lists(texts: Iterable[Sequence[str]]) -> Captions:
        """The captions of images from a list of texts for each; an empty list stands for the empty caption."""
        lists = [tuple(entry) or ("",) for entry in texts]
        encoded = [text.encode() for entry in lists for text in entry]
        text_U = np.frombuffer(b"".join(encoded), np.uint8)
        return Captions(text_U, np.array([*map(len, encoded)], np.int64), np.array([*map(len, lists)], np.int64))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.count_N)

    def __getitem__(self, i: int) -> tuple[str, ...]:
        """The captions of image i."""
        return tuple(self.encode(i, n).decode() for n in range(int(self.count_N[i])))

    def encode(self, i: int, n: int) -> bytes:
        """Caption n of image i in UTF-8."""
        caption = int(self.first_N[i]) + n
        start = int(self._start_C[caption])
        return self.text_U[start : start + int(self.length_C[caption])].tobytes()

    def select(self, index: np.ndarray) -> Captions:
        """The captions of these images, in this order."""
        captions = _join_ranges(self.first_N[index], self.count_N[index])
        text_U = self.text_U[_join_ranges(self._start_C[captions], self.length_C[captions])]
        return Captions(text_U, self.length_C[captions], self.count_N[index])

    def fingerprint(self) -> str:
        """A digest of the captions and of which image has which."""
        counts = self.length_C.astype("<i8").tobytes() + self.count_N.astype("<i8").tobytes()
        return fingerprint_bytes(fingerprint_bytes(self.text_U.tobytes()).encode() + counts)


def _join_ranges(start_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (length[0] of them), start[1], ..."""
    before_N = np.cumsum(length_N) - length_N
    return np.repeat(start_N - before_N, length_N) + np.arange(int(length_N.sum()))


def read_cell(value: Any, where: str) -> tuple[str, ...]:
    """The captions of a cell: a text, a list of texts, or nothing. UserError, starting with `where`, for others."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} must hold a text, or a list of texts, in every row; a row has {str(value)[:80]!r}")
    return tuple(texts)


def collect_captions(rows: Iterable[tuple[str, Sequence[str]]], where: str, unused: Unused) -> Captions:
    """The captions of images from (name, texts) of each.

    Spaces at both ends are removed. Empty captions are left out; they, and images that have no other, are counted in
    `unused`. Raises UserError when no image has a caption.
    """
    kept, without, first, total = [], 0, "", 0
    for name, texts in rows:
        stripped = tuple(text.strip() for text in texts)
        filled = tuple(dict.fromkeys(filter(None, stripped)))
        unused.add("empty captions", "", name, sum(not text for text in stripped))
        total += 1
        if not filled:
            first, without = first or name, without + 1
        kept.append(filled)
    if without == total:
        raise UserError(f"{where} has captions without any text, such as of {first}")
    if without:
        unused.remark(f"{without} of {total} images have no caption, such as {first}: they have the empty caption")
    return Captions.from_lists(kept)
