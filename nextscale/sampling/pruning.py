"""Token pruning at late scales (FastVAR, arXiv 2503.23367): most cells of a fine map have settled at a coarser one.

At a pruned scale, each layer computes only the tokens that differ most from the map's mean; for the others it repeats
what it added at the last scale that was computed whole, enlarged to the map at hand. Needs no training.

Letters: B sequences, N tokens of the scale, n of them computed, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.pyramid import Pyramid


class Pruning:
    """The plan for one pyramid, and what the layers of one generation added at the last whole scale.

    `ratios`: share of tokens left out at each of the last scales, coarse to fine, 0 to below 1. `first_block`: blocks
    before it compute every token, as they mark where detail is to come.
    """

    def __init__(self, pyramid: Pyramid, ratios: tuple[float, ...], first_block: int):
        if len(ratios) >= len(pyramid):
            raise UserError(f"prune lists {len(ratios)} scales; of {len(pyramid)} the first must be computed whole")
        self.pyramid, self.first_block = pyramid, first_block
        self.first_scale = len(pyramid) - len(ratios)
        pruned = [n - int(n * r) for n, r in zip(pyramid.counts[self.first_scale :], ratios, strict=True)]
        self.computed = [*pyramid.counts[: self.first_scale], *pruned]
        self._added: dict[tuple[int, int], Tensor] = {}

    def applies(self, k: int, block: int) -> bool:
        """Whether this block computes only a part of scale k."""
        return k >= self.first_scale and block >= self.first_block

    def span(self, k: int, block: int) -> tuple[int, int]:
        """Which positions of a cache the keys of scale k take in this block."""
        if block < self.first_block:
            return self.pyramid.spans[k]
        start = sum(self.computed[:k])
        return start, start + self.computed[k]

    def added(
        self, k: int, block: int, layer: int, x_BND: Tensor, branch: Callable[[Tensor], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Any]:
        """What a layer adds to x (B, N, D): `branch` of all tokens or, at a pruned scale, of those that differ most."""
        place = (block, layer)
        if not self.applies(k, block):
            y_BND, record = branch(x_BND)
            if k == self.first_scale - 1:
                self._added[place] = y_BND
            return y_BND, record
        index_Bn1 = farthest(x_BND, self.computed[k])
        index_BnD = index_Bn1.expand(-1, -1, x_BND.shape[-1])
        y_BnD, record = branch(x_BND.gather(1, index_BnD))
        old_BND = enlarged(self._added[place], self.pyramid.sides[self.first_scale - 1], self.pyramid.sides[k])
        return old_BND.scatter(1, index_BnD, y_BnD), record


def farthest(x_BND: Tensor, count: int) -> Tensor:
    """Indices (B, count, 1) of the tokens at the largest squared distance from the mean token."""
    distance_BN = (x_BND - x_BND.mean(dim=1, keepdim=True)).float().square().sum(dim=-1)
    return distance_BN.topk(count, dim=1).indices.unsqueeze(-1)


def enlarged(x_BND: Tensor, side: tuple[int, int], larger: tuple[int, int]) -> Tensor:
    """A map of tokens resampled by area to a larger side."""
    x_BDhw = x_BND.transpose(1, 2).unflatten(2, side)
    return F.interpolate(x_BDhw, larger, mode="area").flatten(2).transpose(1, 2).contiguous()
