"""Self-attention over scales.

Letters: B batch, N tokens at hand, L tokens visible, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nextscale.backends.cpu import build, ops
from nextscale.backends.cpu.blocks import attend
from nextscale.backends.cpu.ops import Linear
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import KVCache, ScaleContext, attention_segments

_MAX_LOG_SCALE = math.log(100)


def _rescaled(x_BHNd: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Vectors rescaled to `length` along the last dimension, in one pass over them; those of no length stay."""
    norm = torch.linalg.vector_norm(x_BHNd, dim=-1, keepdim=True).clamp_min(1e-12)
    return x_BHNd * (length / norm)


class Attention(nn.Module):
    """Multi-head attention as in VAR: the key has no bias; queries and keys are L2-normalised when `qk_norm`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, H = config.width, config.heads
        self.heads, self.head_width = H, D // H
        self.qkv = Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.proj = Linear(D, D)
        # Log of what multiplies normalised queries, per head; the softmax then needs no scale of its own.
        self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4.0))) if config.qk_norm else None
        self.softmax_scale = 1.0 if config.qk_norm else 0.25 / math.sqrt(self.head_width)

    @property
    def outputs(self) -> list[Linear]:
        """The last projection, which writes to the residual stream."""
        return [self.proj]

    def new_state(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` sequences of `length` tokens."""
        return KVCache(batch, self.heads, length, self.head_width, like=self.q_bias)

    def forward(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, None]:
        B, N, _ = x_BND.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv.product(x_BND, bias).view(B, N, 3, self.heads, self.head_width)
        y_BND = self.compiled(qkv, context)
        return self.proj(y_BND if y_BND is not None else self.by_operators(qkv, context)), None

    def by_operators(self, qkv_BN3Hd: Tensor, context: ScaleContext) -> Tensor:
        """All between the two projections, (B, N, D)."""
        q, k, v = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
        if self.log_scale is not None:
            q = _rescaled(q, self.log_scale.clamp_max(_MAX_LOG_SCALE).exp())
            k = _rescaled(k)
        if context.state is not None:
            k, v = context.state.update(context.span, k, v)
        return self._attend(q, k, v, context).transpose(1, 2).flatten(2)

    def compiled(self, qkv_BN3Hd: Tensor, context: ScaleContext) -> Tensor | None:
        """As `by_operators`, for one scale, in one pass; None where there is no kernel for it."""
        if context.together or not build.usable(qkv_BN3Hd, self.q_bias):
            return None
        cache: KVCache | None = context.state
        if self.log_scale is not None:
            lengths_H = self.log_scale.clamp_max(_MAX_LOG_SCALE).exp().flatten()
        else:
            lengths_H = self.q_bias.new_full((self.heads,), self.softmax_scale)
        caches, start = ((cache.k_BHLd, cache.v_BHLd), context.span[0]) if cache is not None else (None, 0)
        return attend(qkv_BN3Hd, caches, start, lengths_H, self.log_scale is not None)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        """Softmax attention (B, H, N, d): to all keys, or under the block-causal mask, piece by piece."""
        if not context.together or not ops.fast:
            return ops.attention(q, k, v, context.mask(q.device), self.softmax_scale)
        pieces = [
            ops.attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask, self.softmax_scale)
            for start, end, mask in attention_segments(context.pyramid, q.shape[2], q.device)
        ]
        return torch.cat(pieces, dim=2)


class ScaleAttention(Attention):
    """Attention within each scale alone (M-VAR, arXiv 2411.10433): no mask, and nothing to keep for later scales."""

    def new_state(self, batch: int, length: int) -> None:  # type: ignore[override]
        """None: no scale looks at another."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        pieces = [
            ops.attention(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], None, self.softmax_scale)
            for start, end in context.segments(q.shape[2])
        ]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
