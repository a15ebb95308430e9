"""The mixture of experts that stands in a block where a dense FFN would (MEPA, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.ops import Linear, linear
from nextscale.config.feed_forward import ExpertsConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.experts import Experts
from nextscale.transformer.feed_forward.routers import ROUTERS, Routing
from nextscale.transformer.feed_forward.stacked import StackedLinear


class MixtureOfExperts(nn.Module):
    """y_i = sum_j G_ij E_j(x_i). The record is the `Routing`."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__()
        self.router = ROUTERS[config.experts.router](config, scales, block)
        self.experts = Experts(config.experts.count, config.width, config.ffn_width)
        self.count = config.experts.count
        self.idle = IdleExperts(config.experts, config.width) if config.experts.zero_computation else None

    @property
    def outputs(self) -> list[StackedLinear]:
        """The last projections, which write to the residual stream."""
        return [self.experts.fc2]

    def forward(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, Routing]:
        B, N, _ = x_BND.shape
        routing, M = self.router(x_BND, context), self.count
        parts = x_BND, routing.gates_BNM[..., :M], routing.chosen_BNM[..., :M]
        pairs = self.router.pairs((B, N), context)
        y_BND = self.experts(*(part.flatten(0, 1) for part in parts), pairs).view_as(x_BND)
        if self.idle is not None:
            y_BND = y_BND + self.idle(x_BND, routing.gates_BNM[..., M:].to(x_BND.dtype))
        return y_BND, routing


class IdleExperts(nn.Module):
    """MoE++'s experts that compute next to nothing: zero gives 0, copy x, constant a x + b v.

    (a, b) = softmax(U x); U and v are learned, for each constant expert.
    """

    def __init__(self, config: ExpertsConfig, width: int):
        super().__init__()
        self.kinds = (config.zero, config.copy, config.constant)
        self.mix = Linear(width, 2 * config.constant, bias=False) if config.constant else None
        self.constant = nn.Parameter(torch.zeros(config.constant, width)) if config.constant else None

    def forward(self, x_BND: Tensor, gates_BNI: Tensor) -> Tensor:
        """Their gated sum; `gates_BNI` in the order zero, copy, constant."""
        _, copies, constants = gates_BNI.split(self.kinds, dim=-1)
        weight_BN1 = copies.sum(dim=-1, keepdim=True)
        if self.mix is None or self.constant is None:
            return x_BND * weight_BN1
        mix_BNc2 = self.mix(x_BND).unflatten(-1, (-1, 2)).softmax(dim=-1) * constants.unsqueeze(-1)
        weight_BN1 = weight_BN1 + mix_BNc2[..., 0].sum(dim=-1, keepdim=True)
        return x_BND * weight_BN1 + linear(mix_BNc2[..., 1], self.constant.T.contiguous())
