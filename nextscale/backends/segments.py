"""The block-causal mask in pieces, so that attention computes no more than what a token may see."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from nextscale.pyramid import Pyramid
from nextscale.transformer.attention import Attention
from nextscale.transformer.context import ScaleContext, block_causal_mask

_MASKED = 160
"""Tokens of the coarsest scales that are attended to together, under a mask; each later scale needs none."""

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@lru_cache(maxsize=8)
def list_segments(pyramid: Pyramid, length: int, device: torch.device) -> list[tuple[int, int, Tensor | None]]:
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


def attend_segments(attention: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
    """Attention (B, H, N, d) of one scale to all keys, or of several scales under the block-causal mask in pieces."""
    if not context.teacher_forced:
        return attention(q, k, v, None)
    pieces = [
        attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask)
        for start, end, mask in list_segments(context.pyramid, q.shape[2], q.device)
    ]
    return torch.cat(pieces, dim=2)


class SegmentedAttention(Attention):
    """Attention of training in pieces, on any device."""

    plain = Attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        return attend_segments(self.attention, q, k, v, context)
