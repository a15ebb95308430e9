"""The dense feed-forward of VAR."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import FeedForward


class DenseFeedForward(FeedForward):
    """D to ffn_width to D with tanh-GELU."""

    def __init__(self, config: TransformerConfig, scales: int = 0, block: int = 0):
        super().__init__(config, scales, block)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    @property
    def output_layers(self) -> list[Any]:
        return [self.fc2]

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Any = None) -> tuple[Tensor, None]:
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh")), None

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        return tokens * 2 * config.width * config.ffn_width
