"""Randomness as in the official code, which reproduces its tokens; an image then depends on its batch."""

from __future__ import annotations

import torch
from torch import Tensor


class OfficialRandom:
    """The official code's order of draws from one generator on the model's device."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw_tokens(self, logits_BNV: Tensor, k: int) -> Tensor:
        B, N, V = logits_BNV.shape
        rows = logits_BNV.softmax(dim=-1).view(-1, V).nan_to_num(nan=1.0)  # the sampler reports logits that are NaN
        return torch.multinomial(rows, 1, replacement=True, generator=self.generator).view(B, N)

    def draw_gumbel(self, logits_BNV: Tensor, k: int) -> Tensor:
        return -torch.empty_like(logits_BNV).exponential_(generator=self.generator).log()
