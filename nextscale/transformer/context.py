"""What a layer receives besides its input. No module keeps the state of a run.

Letters: L tokens of all scales, N tokens at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextscale.pyramid import Pyramid

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.thresholds import Thresholds


@dataclass(frozen=True)
class ScaleContext:
    """Where in the pyramid the tokens at hand are."""

    pyramid: Pyramid
    span: tuple[int, int]
    """Positions of the tokens at hand in the packed sequence."""
    teacher_forced: bool = False
    """Whether the tokens at hand are those of all scales from the first one on; otherwise they are of one scale, and
    may see one another and all cached ones."""
    k: int = 0
    """The finest scale at hand."""
    thresholds: Thresholds | None = None
    """Thresholds of dynamic experts; None: all experts work."""

    def index_scales(self, device: torch.device) -> Tensor:
        """Which scale each token at hand belongs to, int64: (N,), or (1,) when all are of one."""
        start, end = self.span
        if not self.teacher_forced:  # with token pruning the span counts computed tokens
            start = self.pyramid.spans[self.k][0]
            end = start + 1
        return index_scales(self.pyramid, device)[start:end]

    def mask(self, device: torch.device) -> Tensor | None:
        """True where a token may look, (N, N); None when it may see all."""
        return block_causal_mask(self.pyramid, device, self.span[1]) if self.teacher_forced else None

    def list_spans(self, count: int) -> list[tuple[int, int]]:
        """The `count` tokens at hand, scale by scale."""
        if not self.teacher_forced:
            return [(0, count)]
        return [span for span in self.pyramid.spans if span[1] <= count]


@lru_cache(maxsize=8)
def index_scales(pyramid: Pyramid, device: torch.device) -> Tensor:
    """Which scale each position belongs to, int64 (L,). Copied to the device once: a captured graph may not wait."""
    with torch.inference_mode(False):  # it may be used in training later
        return torch.tensor(pyramid.scale_of_L, device=device)


@lru_cache(maxsize=8)
def block_causal_mask(pyramid: Pyramid, device: torch.device, length: int | None = None) -> Tensor:
    """(L, L), True where the row's token may see the column's: its own scale and all coarser ones; or of the first
    `length` tokens alone."""
    scale_L = index_scales(pyramid, device)[:length]
    with torch.inference_mode(False):
        return scale_L[:, None] >= scale_L[None, :]
