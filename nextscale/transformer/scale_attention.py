"""Self-attention within each scale (M-VAR, arXiv 2411.10433).

Letters: B batch, N tokens at hand, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.attention import Attention
from nextscale.transformer.context import ScaleContext


class ScaleAttention(Attention):
    """Attention within each scale alone (M-VAR, arXiv 2411.10433): no mask, and nothing to keep for later scales."""

    def new_state(self, batch: int, length: int) -> None:
        """None: no scale looks at another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        """Attention (B, H, N, d) to the tokens of the same scale."""
        pieces = [
            self.attention(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], None)
            for start, end in context.list_spans(q.shape[2])
        ]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, tokens: int, visible: int) -> int:
        return super().count_multiply_adds(config, tokens, tokens)

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        return 0
