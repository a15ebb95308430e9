"""Attention to the sequence of the condition, such as the tokens of a caption (as Infinity, arXiv 2412.04431).

Keys and values do not depend on the scale: they are computed once for a batch and serve all scales.

Letters: B batch, N tokens at hand, T tokens of the sequence, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for
from nextscale.common.registry import CONDITIONS
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.attention import compute_query_length, scale_to_length
from nextscale.transformer.condition import EmbeddedCondition
from nextscale.transformer.context import Mixer, ScaleContext

Memory = tuple[Tensor, Tensor, Tensor]
"""Keys and values of a sequence (B, H, T, d) and its mask (B, 1, 1, T), True where there is content."""


class CrossAttention(Mixer):
    """Multi-head attention to the condition's sequence, with normalised queries and keys as in self-attention."""

    reads_condition = True

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        D, H = config.width, config.heads
        self.heads, self.head_width = H, D // H
        self.q, self.kv, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4.0))) if config.qk_norm else None
        self.softmax_scale = 1.0 if config.qk_norm else 0.25 / math.sqrt(self.head_width)

    @property
    def output_layers(self) -> list[nn.Linear]:
        return [self.proj]

    def read_condition(self, given: EmbeddedCondition) -> Memory:
        if given.sequence_BTD is None or given.mask_BT is None:
            raise UserError("the mixer cross-attention needs a condition that gives a sequence, such as text")
        return self.read_sequence(given.sequence_BTD, given.mask_BT)

    def read_sequence(self, sequence_BTD: Tensor, mask_BT: Tensor) -> Memory:
        """Keys and values of a sequence."""
        kv_BT2Hd = self.kv(cast_for(self.kv, sequence_BTD)).unflatten(-1, (2, self.heads, self.head_width))
        k, v = kv_BT2Hd.permute(2, 0, 3, 1, 4).unbind(0)
        return k if self.log_scale is None else scale_to_length(k), v, mask_BT[:, None, None, :]

    def forward(self, x_BND: Tensor, context: ScaleContext | None, state: Memory) -> Tensor:
        k, v, mask_B11T = state
        q = self.q(x_BND).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)  # (B, H, N, d)
        if self.log_scale is not None:
            q = scale_to_length(q, compute_query_length(self.log_scale))
        return self.proj(self.attention(q, k, v, mask_B11T).transpose(1, 2).flatten(2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask_B11T: Tensor) -> Tensor:
        """softmax(scale q k^T) v, where `mask` is True."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T, scale=self.softmax_scale)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, tokens: int, visible: int) -> int:
        D = config.width
        return tokens * (2 * D * D + 2 * count_condition_tokens(config) * D)  # q and output; by keys and values

    @classmethod
    def count_condition_multiply_adds(cls, config: TransformerConfig) -> int:
        return count_condition_tokens(config) * 2 * config.width**2

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        return 2 * config.width * count_condition_tokens(config)


def count_condition_tokens(config: TransformerConfig) -> int:
    """Length of the condition's sequence, with its padding."""
    return int(CONDITIONS.get(config.condition.kind).count_tokens(config.condition))
