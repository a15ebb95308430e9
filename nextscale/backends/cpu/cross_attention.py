"""Fast twin of the attention to the condition's sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.backends.cpu.attention import compute_attention
from nextscale.transformer.cross_attention import CrossAttention


class CpuCrossAttention(CrossAttention):
    """Attention to the condition's sequence; in inference one image after the other, as threads share an image's sums
    where there is little work."""

    plain = CrossAttention

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask_B11T: Tensor) -> Tensor:
        if torch.is_grad_enabled() or q.device.type != "cpu":
            return compute_attention(q, k, v, mask_B11T, self.softmax_scale)
        outs = []
        for i in range(len(q)):
            mask_NT = mask_B11T[i, 0].expand(q.shape[2], -1)
            outs.append(compute_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask_NT, self.softmax_scale))
        return torch.cat(outs)
