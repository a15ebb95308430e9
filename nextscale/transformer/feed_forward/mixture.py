"""The mixture of experts that replaces a block's dense feed-forward (MEPA, Eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.registry import ROUTERS
from nextscale.config.transformer import ExpertsConfig, TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import FeedForward, Record
from nextscale.transformer.feed_forward.experts import Experts


class MixtureOfExperts(FeedForward):
    """y_i = sum_j G_ij E_j(x_i). Its record holds the `Routing`."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        self.router = ROUTERS.get(config.experts.router)(config, scales, block)
        self.experts = Experts(config.experts.count, config.width, config.ffn_width)
        self.count = config.experts.count
        # `idle` is the name in checkpoints
        self.idle = ZeroComputationExperts(config.experts, config.width) if config.experts.zero_computation else None

    @property
    def output_layers(self) -> list[Any]:
        return [self.experts.fc2]

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Record | None) -> tuple[Tensor, Record]:
        B, N, _ = x_BND.shape
        routing, M = self.router(x_BND, context, previous), self.count
        inputs = x_BND, routing.gates_BNM[..., :M], routing.selected_BNM[..., :M]
        max_pairs = self.router.count_pairs((B, N), context)
        y_BND = self.experts(*(t.flatten(0, 1) for t in inputs), max_pairs).view_as(x_BND)
        if self.idle is not None:
            y_BND = y_BND + self.idle(x_BND, routing.gates_BNM[..., M:].to(x_BND.dtype))
        return y_BND, Record(routing=routing)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        router: Any = ROUTERS.get(config.experts.router)
        calls = router.count_expert_calls(config.experts, tokens)
        constants = tokens * 3 * config.width * config.experts.constant * bool(config.experts.zero_computation)
        scoring = router.count_multiply_adds(config, scales, tokens, block)
        return calls * 2 * config.width * config.ffn_width + scoring + constants

    @classmethod
    def count_inactive_parameters(cls, config: TransformerConfig) -> int:
        ffn = 2 * config.width * config.ffn_width + config.ffn_width + config.width
        return (config.experts.count - min(config.experts.active, config.experts.count)) * ffn


class ZeroComputationExperts(nn.Module):
    """MoE++'s experts that compute next to nothing: zero gives 0, copy x, constant a x + b v.

    (a, b) = softmax(U x); U and v are learned, for each constant expert.
    """

    def __init__(self, config: ExpertsConfig, width: int):
        super().__init__()
        self.kinds = (config.zero, config.copy, config.constant)
        self.mix = nn.Linear(width, 2 * config.constant, bias=False) if config.constant else None
        self.constant = nn.Parameter(torch.zeros(config.constant, width)) if config.constant else None

    def forward(self, x_BND: Tensor, gates_BNI: Tensor) -> Tensor:
        """Their gated sum; `gates_BNI` in the order zero, copy, constant."""
        _, copies, constants = gates_BNI.split(self.kinds, dim=-1)
        weight_BN1 = copies.sum(dim=-1, keepdim=True)
        if self.mix is None or self.constant is None:
            return x_BND * weight_BN1
        mix_BNc2 = self.mix(x_BND).unflatten(-1, (-1, 2)).softmax(dim=-1) * constants.unsqueeze(-1)
        weight_BN1 = weight_BN1 + mix_BNc2[..., 0].sum(dim=-1, keepdim=True)
        return x_BND * weight_BN1 + self.sum_constants(mix_BNc2[..., 1], self.constant)

    def sum_constants(self, weight_BNc: Tensor, constant_cD: Tensor) -> Tensor:
        """Weighted sum of the constant vectors, (B, N, D)."""
        return weight_BNc @ constant_cD
