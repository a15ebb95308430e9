"""The scale pyramid: the only place that knows which token belongs to which scale.

A pyramid is a list of map sides (h, w), coarse to fine. All maps of one image are packed into one sequence of L
tokens, scale after scale, each row by row; the last map has the size of the tokenizer's feature map. This file needs
no torch, so that configs and the command line parse without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

from nextscale.common.errors import UserError

Side = tuple[int, int]
_LONGEST_SIDE, _MOST_TOKENS, _MOST_SCALES = 4096, 2**24, 256


@dataclass(frozen=True)
class Pyramid:
    """Sides of the K token maps of an image, coarse to fine.

    `sides` takes integers (square maps) and (h, w) pairs. Raises UserError when there is no scale, a side is not an
    integer of 1 to 4096, a map is larger than the last one in either direction, or there are more than
    256 scales or 2^24 tokens.
    """

    sides: tuple[Side, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(_side(s) for s in self.sides))
        if not self.sides:
            raise UserError("a pyramid needs at least one scale; got none. Example: 1,2,3,4")
        h, w = self.sides[-1]
        for k, (hk, wk) in enumerate(self.sides):
            if hk > h or wk > w:
                raise UserError(
                    f"scale {k} of the pyramid is {hk}x{wk}, larger than the last one, {h}x{w}; "
                    "order the scales from coarse to fine"
                )
        tokens = sum(hk * wk for hk, wk in self.sides)
        if tokens > _MOST_TOKENS or len(self.sides) > _MOST_SCALES:
            raise UserError(
                f"a pyramid has up to {_MOST_SCALES} scales and {_MOST_TOKENS} tokens; "
                f"this one has {len(self.sides)} and {tokens}"
            )

    @classmethod
    def parse(cls, text: str) -> Pyramid:
        """Read "1,2,3,4" (square maps) or "1x1,2x3,4x6" (h x w), with commas or spaces between the scales."""
        return cls(tuple(_side(part) for part in text.replace(",", " ").split()))

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> Pyramid | None:
        """The square pyramid with these numbers of tokens per scale, or None when one is not a square number."""
        sides = [round(n**0.5) for n in counts]
        square = all(s * s == n for s, n in zip(sides, counts, strict=True))
        return cls(tuple((s, s) for s in sides)) if square else None

    def __str__(self) -> str:
        return ",".join(str(h) if h == w else f"{h}x{w}" for h, w in self.sides)

    def __len__(self) -> int:
        """Number of scales K."""
        return len(self.sides)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens N of each scale."""
        return tuple(h * w for h, w in self.sides)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each scale in the packed sequence."""
        ends = [sum(self.counts[: k + 1]) for k in range(len(self))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def length(self) -> int:
        """Tokens of all scales, L."""
        return self.spans[-1][1]

    @property
    def last(self) -> Side:
        """Side of the finest map, which is the side of the canvas."""
        return self.sides[-1]

    @cached_property
    def scale_of_L(self) -> tuple[int, ...]:
        """Scale index of every position."""
        return tuple(k for k, n in enumerate(self.counts) for _ in range(n))

    def progress(self, k: int) -> float:
        """How far scale k is on the way, 0 at the first and 1 at the last.

        Guidance and the smooth mode's temperature grow with it. A pyramid of one scale has only a last scale: 1.
        """
        return k / (len(self) - 1) if len(self) > 1 else 1.0

    def resize(self, last: Side) -> Pyramid:
        """As many scales for another last side: each side is in proportion to the last one, and at least 1."""
        (h, w), (new_h, new_w) = self.last, last
        return Pyramid(tuple((max(1, round(i * new_h / h)), max(1, round(j * new_w / w))) for i, j in self.sides))

    def phi_index(self, num_phi: int) -> tuple[int, ...]:
        """Which of `num_phi` shared convolutions serves each scale: the one whose tick is nearest to k/(K-1).

        The ticks are those of the official VAR code, 4 phi being a case of their own. Exact ties occur (K=10: scales
        2 and 7) and float64 rounding decides them, so the arithmetic below is numpy.linspace's, step by step.
        """
        margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
        ticks = [margin]
        if num_phi > 1:
            step = (1 - margin - margin) / (num_phi - 1)
            ticks = [i * step + margin for i in range(num_phi - 1)] + [1 - margin]
        where = [k / (len(self) - 1) if len(self) > 1 else 0.0 for k in range(len(self))]
        return tuple(min(range(num_phi), key=lambda i: abs(ticks[i] - x)) for x in where)


def match_scales(old: Pyramid, new: Pyramid) -> list[int]:
    """For each scale of `new`, the scale of `old` at the nearest progress; the earlier one on ties."""
    return [min(range(len(old)), key=lambda j: abs(old.progress(j) - new.progress(k))) for k in range(len(new))]


def _side(value: object) -> Side:
    """One side as (h, w): from 4, (2, 3), [2, 3], "4" or "2x3"."""
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    numbers = [_parse_length(part) for part in parts[:3]]
    if len(numbers) == 1:
        numbers *= 2
    if len(numbers) != 2 or not all(1 <= n <= _LONGEST_SIDE for n in numbers):
        raise UserError(
            f"'{str(value)[:80]}' is no side of a token map; write a positive integer (4) or height x width (2x3), "
            f"up to {_LONGEST_SIDE}"
        )
    return numbers[0], numbers[1]


def _parse_length(value: object) -> int:
    """An integer, or one as text; 0 for anything else, such as 1.5 or true."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else 0
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return 0
    return value.__index__()


PYRAMID_256 = Pyramid.parse("1,2,3,4,5,6,8,10,13,16")
PYRAMID_512 = Pyramid.parse("1,2,3,4,6,9,13,18,24,32")
PYRAMID_1024 = Pyramid.parse("1,2,3,4,5,7,9,12,16,21,27,36,48,64")
