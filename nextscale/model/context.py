"""What a layer receives besides its input, and what a layer must offer. No module keeps the state of a run.

Letters: B batch, L tokens of all scales, N tokens at hand, D width, H heads, S layers of a block, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nextscale.pyramid import Pyramid

_MASKED = 160
"""Tokens of the coarsest scales that are attended to together, under a mask; each later scale needs none."""


@dataclass(frozen=True)
class ScaleContext:
    """Where in the pyramid a block stands, and the values it works with there."""

    pyramid: Pyramid
    span: tuple[int, int]
    """Positions of the tokens at hand in the packed sequence."""
    mask_LL: Tensor | None = None
    """True where a token may look; None when it may see all tokens at hand and all cached ones."""
    state: Any = None
    """This layer's own state (a KVCache for attention), or None when all scales run at once."""


class Layer(Protocol):
    """A mixer or a feed-forward layer: (x, context) to (y, record). The record holds what a router has to tell."""

    def __call__(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, Any]: ...


class KVCache:
    """Keys and values of one attention layer, allocated once for all L positions: two tensors (B, H, L, d)."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.k_BHLd = like.new_empty(batch, heads, length, head_width)
        self.v_BHLd = like.new_empty(batch, heads, length, head_width)

    def update(self, span: tuple[int, int], k_BHNd: Tensor, v_BHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the positions of `span`; return everything up to its end."""
        start, end = span
        self.k_BHLd[:, :, start:end] = k_BHNd
        self.v_BHLd[:, :, start:end] = v_BHNd
        return self.k_BHLd[:, :, :end], self.v_BHLd[:, :, :end]


@lru_cache(maxsize=8)
def block_causal_mask(pyramid: Pyramid, device: torch.device) -> Tensor:
    """(L, L), True where the row's token may see the column's: its own scale and all coarser ones."""
    scale_L = torch.tensor(pyramid.scale_of_L, device=device)
    return scale_L[:, None] >= scale_L[None, :]


@lru_cache(maxsize=8)
def attention_segments(pyramid: Pyramid, device: torch.device) -> list[tuple[int, int, Tensor | None]]:
    """The block-causal mask in pieces: queries start to end may see keys 0 to end, under a mask or all of them.

    Scale by scale the mask is a rectangle without holes, so 62 % of the arithmetic of the whole square does (256 px).
    The first scales are so short that they are faster in one piece.
    """
    ends = [end for _, end in pyramid.spans]
    first = max((end for end in ends if end <= _MASKED), default=ends[0])
    mask = block_causal_mask(pyramid, device)[:first, :first] if first != ends[0] else None
    later = [span for span in pyramid.spans if span[0] >= first]
    return [(0, first, mask), *((start, end, None) for start, end in later)]
