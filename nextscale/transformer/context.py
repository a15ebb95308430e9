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
from nextscale.sampling.pruning import Pruning
from nextscale.transformer.feed_forward.thresholds import Thresholds

_MASKED = 160
"""Tokens of the coarsest scales that are attended to together, under a mask; each later scale needs none."""


@dataclass(frozen=True)
class ScaleContext:
    """Where in the pyramid a block stands, and the values it works with there."""

    pyramid: Pyramid
    span: tuple[int, int]
    """Positions of the tokens at hand in the packed sequence."""
    together: bool = False
    """Whether the tokens at hand are those of several scales, from the first one on; otherwise they are of one scale,
    and may see one another and all cached ones."""
    state: Any = None
    """This layer's own state (a KVCache for attention), or None when all scales run at once."""
    k: int = 0
    """The finest scale at hand."""
    pruning: Pruning | None = None
    """Which tokens are left out, or None when all are computed."""
    thresholds: Thresholds | None = None
    """How far dynamic experts are turned down; None: not at all."""
    previous: Any = None
    """What the same layer of the block before recorded; None in the first block."""

    def scales(self, device: torch.device) -> Tensor:
        """Which scale each token at hand belongs to, int64: (N,), or (1,) when all are of one."""
        start, end = self.span
        if not self.together:  # a step; under a pruning its span counts computed tokens
            start = self.pyramid.spans[self.k][0]
            end = start + 1
        return scale_indices(self.pyramid, device)[start:end]

    def mask(self, device: torch.device) -> Tensor | None:
        """True where a token may look, (N, N); None when it may see all."""
        return block_causal_mask(self.pyramid, device, self.span[1]) if self.together else None

    def segments(self, count: int) -> list[tuple[int, int]]:
        """The `count` tokens at hand, scale by scale."""
        if not self.together:
            return [(0, count)]
        return [span for span in self.pyramid.spans if span[1] <= count]


class Layer(Protocol):
    """A mixer or a feed-forward layer: (x, context) to (y, record). The record holds what a router has to tell."""

    def __call__(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, Any]: ...


class KVCache:
    """Keys and values of one attention layer, in two tensors (B, H, `length`, d) that are allocated once.

    `length` leaves out the last scale, which no later one looks at.
    """

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.k_BHLd = like.new_empty(batch, heads, length, head_width)
        self.v_BHLd = like.new_empty(batch, heads, length, head_width)

    def update(self, span: tuple[int, int], k_BHNd: Tensor, v_BHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Everything up to the end of `span`, whose keys and values these are; they are kept if there is room."""
        start, end = span
        if end > self.k_BHLd.shape[2]:
            past_k, past_v = self.k_BHLd[:, :, :start], self.v_BHLd[:, :, :start]
            return torch.cat((past_k, k_BHNd), dim=2), torch.cat((past_v, v_BHNd), dim=2)
        self.k_BHLd[:, :, start:end] = k_BHNd
        self.v_BHLd[:, :, start:end] = v_BHNd
        return self.k_BHLd[:, :, :end], self.v_BHLd[:, :, :end]


@lru_cache(maxsize=8)
def scale_indices(pyramid: Pyramid, device: torch.device) -> Tensor:
    """Which scale each position belongs to, int64 (L,). Copied to the device once: a captured graph may not wait."""
    with torch.inference_mode(False):  # what is kept may be used in training later
        return torch.tensor(pyramid.scale_of_L, device=device)


@lru_cache(maxsize=8)
def block_causal_mask(pyramid: Pyramid, device: torch.device, length: int | None = None) -> Tensor:
    """(L, L), True where the row's token may see the column's: its own scale and all coarser ones; or of the first
    `length` tokens alone."""
    scale_L = scale_indices(pyramid, device)[:length]
    with torch.inference_mode(False):
        return scale_L[:, None] >= scale_L[None, :]


@lru_cache(maxsize=8)
def attention_segments(pyramid: Pyramid, length: int, device: torch.device) -> list[tuple[int, int, Tensor | None]]:
    """The block-causal mask of the first `length` tokens in pieces: which queries see all keys up to their last one.

    Queries start to end may see keys 0 to end, under a mask or all of them. Scale by scale the mask is a rectangle
    without holes, so 62 % of the arithmetic of the whole square does (256 px). The first scales are so short that they
    are faster in one piece.
    """
    spans = [span for span in pyramid.spans if span[1] <= length]
    ends = [end for _, end in spans]
    first = max((end for end in ends if end <= _MASKED), default=ends[0])
    mask = block_causal_mask(pyramid, device, first) if first != ends[0] else None
    later = [span for span in spans if span[0] >= first]
    return [(0, first, mask), *((start, end, None) for start, end in later)]
