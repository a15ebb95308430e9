"""Transformer layers over the sequence of a condition. Letters: B batch, T tokens, D width."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.cross_attention import CrossAttention
from nextscale.transformer.feed_forward import DenseFeedForward


class EncoderLayer(nn.Module):
    """x += attention(LN(x)); x += feed_forward(LN(x)), where attention sees what is not padding."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention, self.ffn = CrossAttention(config), DenseFeedForward(config)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        y_BTD = self.norm1(x_BTD)
        x_BTD = x_BTD + self.attention(y_BTD, None, self.attention.read_sequence(y_BTD, mask_BT))
        return x_BTD + self.ffn(self.norm2(x_BTD), None)[0]


def create_layers(count: int, width: int) -> nn.ModuleList:
    """Layers of this width, with heads of 64 where the width is a multiple of it."""
    config = TransformerConfig(depth=1, width=width, heads=math.gcd(width, max(width // 64, 1)))
    return nn.ModuleList(EncoderLayer(config) for _ in range(count))


def count_layer_multiply_adds(tokens: int, width: int) -> int:
    """Multiply-adds of a layer: projections, attention and feed-forward."""
    return tokens * (4 * width * width + 2 * tokens * width + 8 * width * width)


def average_tokens(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean (B, D) over the tokens where the mask is True, added in an order that no batch changes."""
    total_BTD = x_BTD * mask_BT[..., None]
    while total_BTD.shape[1] > 1:
        half = (total_BTD.shape[1] + 1) // 2
        first, second = total_BTD[:, :half], total_BTD[:, half:]
        total_BTD = first + F.pad(second, (0, 0, 0, half - second.shape[1]))
    return total_BTD[:, 0] / mask_BT.sum(dim=1, keepdim=True)
