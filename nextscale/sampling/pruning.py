"""Token pruning at late scales (FastVAR, arXiv 2503.23367): most cells of a fine map have settled at a coarser one.

At a pruned scale, each layer computes only the tokens that differ most from the map's mean. For the others it repeats
what it added at the last scale that was not pruned, resampled to the present map. It needs no training.

Letters: B sequences, N tokens of the scale, n of them computed, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import ModelPredictor
from nextscale.transformer.block import Block
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.var import VAR, Output

RunBranch = Callable[[Tensor], tuple[Tensor, Record | None]]
"""Tokens (B, n, D) to what a layer adds to them, and its record."""


class PruningPlan:
    """How many tokens of each scale are computed.

    `ratios`: share of tokens left out at each of the last scales, coarse to fine, 0 to below 1. `first_block`: blocks
    before it compute every token, because they find where the details are.
    """

    def __init__(self, pyramid: Pyramid, ratios: tuple[float, ...], first_block: int):
        if len(ratios) >= len(pyramid):
            raise UserError(f"prune lists {len(ratios)} scales; of {len(pyramid)} the first must be computed whole")
        self.pyramid, self.first_block = pyramid, first_block
        self.first_scale = len(pyramid) - len(ratios)
        pruned = [n - int(n * r) for n, r in zip(pyramid.counts[self.first_scale :], ratios, strict=True)]
        self.computed = [*pyramid.counts[: self.first_scale], *pruned]

    def applies(self, k: int, block: int) -> bool:
        """Whether this block computes only a part of scale k."""
        return k >= self.first_scale and block >= self.first_block

    def span(self, k: int, block: int) -> tuple[int, int]:
        """Which positions of a cache the keys of scale k take in this block."""
        if block < self.first_block:
            return self.pyramid.spans[k]
        start = sum(self.computed[:k])
        return start, start + self.computed[k]


class PrunedPredictor(ModelPredictor):
    """A model's steps in which late scales compute only a part of their tokens."""

    def __init__(self, model: VAR, values: Any, plan: PruningPlan, thresholds: Thresholds | None = None):
        super().__init__(model, values, thresholds)
        self.plan = plan
        self._added: dict[tuple[int, int], Tensor] = {}
        """What each layer of each block added at the last scale that was not pruned."""

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        self.finish_sequences(x_BNC)
        model, records = self.model, list[Record | None]()
        x_BND = model.embed_scale(self.conditioning, x_BNC, k)
        for i, (block, adaln_B3SD) in enumerate(zip(model.blocks, self.conditioning.blocks_B3SD, strict=True)):
            states = self.conditioning.join_states(i, self.cache[i]) or []
            span = self.plan.span(k, block.index)
            context = model.locate(span, k, self.thresholds)
            previous, record = records[-1] if records else None, None
            for s in range(len(block.layers)):
                run = partial(run_branch, block, s, adaln_B3SD, context, states, previous)
                added_BND, record = self._run_pruned(run, x_BND, k, block.index, s)
                x_BND = x_BND + added_BND
            records.append(record)
        return Output(model.predict_logits(x_BND, self.conditioning), records)

    def _run_pruned(
        self, run: RunBranch, x_BND: Tensor, k: int, block: int, layer: int
    ) -> tuple[Tensor, Record | None]:
        """What a layer adds to x (B, N, D). At a pruned scale it is computed for the tokens that differ most."""
        if not self.plan.applies(k, block):
            y_BND, record = run(x_BND)
            if k == self.plan.first_scale - 1 and block >= self.plan.first_block:
                self._added[block, layer] = y_BND
            return y_BND, record
        index_Bn1 = find_farthest(x_BND, self.plan.computed[k])
        index_BnD = index_Bn1.expand(-1, -1, x_BND.shape[-1])
        y_BnD, record = run(x_BND.gather(1, index_BnD))
        sides = self.model.pyramid.sides
        earlier_BND = resize_map(self._added[block, layer][: len(x_BND)], sides[self.plan.first_scale - 1], sides[k])
        return earlier_BND.scatter(1, index_BnD, y_BnD), record


def run_branch(
    block: Block, s: int, adaln_B3SD: Tensor, context: ScaleContext, states: list[Any], previous: Record | None,
    x_BnD: Tensor,
) -> tuple[Tensor, Record | None]:  # fmt: skip
    """gamma_s * layer_s(LN(x) (1 + scale_s) + shift_s), and the record if it is the feed-forward."""
    gamma, scale, shift = adaln_B3SD[:, :, s].unsqueeze(2).unbind(1)
    y_BnD, record = block.run_layer(s, x_BnD, scale, shift, context, states, previous)
    return y_BnD * gamma, record


def find_farthest(x_BND: Tensor, count: int) -> Tensor:
    """Indices (B, count, 1) of the tokens at the largest squared distance from the mean token."""
    distance_BN = (x_BND - x_BND.mean(dim=1, keepdim=True)).float().square().sum(dim=-1)
    return distance_BN.topk(count, dim=1).indices.unsqueeze(-1)


def resize_map(x_BND: Tensor, side: tuple[int, int], new_side: tuple[int, int]) -> Tensor:
    """A map of tokens resampled by area to a new side."""
    x_BDhw = x_BND.transpose(1, 2).unflatten(2, side)
    return F.interpolate(x_BDhw, new_side, mode="area").flatten(2).transpose(1, 2).contiguous()
