"""Self-attention over scales.

Letters: B batch, N tokens at hand, L tokens visible, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import Mixer, ScaleContext

_MAX_LOG_SCALE = math.log(100)


class KVCache:
    """Keys and values of one attention layer, in two tensors (B, H, `length`, d) that are allocated once.

    `length` leaves out the last scale, which no later one looks at.
    """

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.k_BHLd = like.new_empty(batch, heads, length, head_width)
        self.v_BHLd = like.new_empty(batch, heads, length, head_width)

    def update(self, span: tuple[int, int], k_BHNd: Tensor, v_BHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values up to the end of `span`, from those of the span, which are stored if there is room."""
        start, end = span
        if end > self.k_BHLd.shape[2]:
            past_k, past_v = self.k_BHLd[:, :, :start], self.v_BHLd[:, :, :start]
            return torch.cat((past_k, k_BHNd), dim=2), torch.cat((past_v, v_BHNd), dim=2)
        self.k_BHLd[:, :, start:end] = k_BHNd
        self.v_BHLd[:, :, start:end] = v_BHNd
        return self.k_BHLd[:, :, :end], self.v_BHLd[:, :, :end]


class Attention(Mixer):
    """Multi-head attention as in VAR: the key has no bias; queries and keys are L2-normalised when `qk_norm`."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        D, H = config.width, config.heads
        self.heads, self.head_width = H, D // H
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.proj = nn.Linear(D, D)
        # Log of what multiplies normalised queries, per head; the softmax then needs no scale of its own.
        self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4.0))) if config.qk_norm else None
        self.softmax_scale = 1.0 if config.qk_norm else 0.25 / math.sqrt(self.head_width)
        self.rotary = config.positions if config.positions.kind == "rotary" else None

    @property
    def output_layers(self) -> list[nn.Linear]:
        return [self.proj]

    def new_state(self, batch: int, length: int) -> KVCache | None:
        """An empty cache for `batch` sequences of `length` tokens."""
        return KVCache(batch, self.heads, length, self.head_width, like=self.q_bias)

    def forward(self, x_BND: Tensor, context: ScaleContext, state: KVCache | None) -> Tensor:
        qkv_BN3Hd = self.project(x_BND).unflatten(-1, (3, self.heads, self.head_width))
        return self.proj(self.mix(qkv_BN3Hd, context, state))

    def project(self, x_BND: Tensor) -> Tensor:
        """Queries, keys and values side by side, (B, N, 3 D)."""
        if not isinstance(self.qkv, nn.Linear):  # in 8 bits, see `nextscale.transformer.int8`
            return self.qkv.multiply(x_BND, self.join_biases())
        return F.linear(x_BND, self.qkv.weight, self.join_biases())

    def join_biases(self) -> Tensor:
        """The bias of queries, keys (zero) and values, (3 D,)."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def mix(self, qkv_BN3Hd: Tensor, context: ScaleContext, state: KVCache | None) -> Tensor:
        """Everything between the two projections, (B, N, D)."""
        q, k, v = self.split_heads(qkv_BN3Hd, context)
        if state is not None:
            k, v = state.update(context.span, k, v)
        return self.attend(q, k, v, context).transpose(1, 2).flatten(2)

    def split_heads(self, qkv_BN3Hd: Tensor, context: ScaleContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated where the model does so, and values: (B, H, N, d) each."""
        q, k, v = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            q, k = scale_to_length(q, self.query_length()), scale_to_length(k)
        if self.rotary is None:
            return q, k, v
        from nextscale.transformer.positions import compute_rotation, rotate  # most models have a table

        start, end = context.span
        cos_Lf, sin_Lf = compute_rotation(context.pyramid, self.rotary, self.head_width, q.device)
        rotation = cos_Lf[start:end], sin_Lf[start:end]
        return rotate(q, rotation), rotate(k, rotation), v

    def query_length(self) -> Tensor:
        """The length that queries are scaled to, (1, H, 1, 1)."""
        assert self.log_scale is not None, "only with qk_norm"
        return compute_query_length(self.log_scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        """Attention (B, H, N, d) to all visible tokens."""
        return self.attention(q, k, v, context.mask(q.device))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(scale q k^T) v, where `mask` is True."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, tokens: int, visible: int) -> int:
        D = config.width
        return tokens * (4 * D * D + 2 * visible * D)  # q, k, v and output; queries by keys, weights by values

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        return 2 * config.width * cached


def compute_query_length(log_scale: Tensor) -> Tensor:
    """The length of normalised queries, from its logarithm."""
    return log_scale.clamp_max(_MAX_LOG_SCALE).exp()


def scale_to_length(x_BHNd: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Vectors scaled to `length` along the last dimension, in one pass; vectors of length 0 stay 0."""
    norm = torch.linalg.vector_norm(x_BHNd, dim=-1, keepdim=True).clamp_min(1e-12)
    return x_BHNd * (length / norm)
