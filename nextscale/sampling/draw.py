"""Drawing tokens from random streams of each image's own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nextscale.common.rng import make_generator


class RandomSource(Protocol):
    """Where randomness comes from. At each scale `draw_tokens` is called first, then, in smooth mode, `draw_gumbel`."""

    def draw_tokens(self, logits_BNV: Tensor, k: int) -> Tensor:
        """Draw one token per row from softmax(logits): int64 (B, N)."""

    def draw_gumbel(self, logits_BNV: Tensor, k: int) -> Tensor:
        """Gumbel noise of the logits' shape."""


class PerImageRandom:
    """Streams derived from (seed, number of the image, scale): an image depends neither on its batch nor on the device.

    Image b of the batch is number `first + b`.
    """

    def __init__(self, seed: int, first: int = 0):
        self.seed, self.first = seed, first

    def draw_tokens(self, logits_BNV: Tensor, k: int) -> Tensor:
        B, N, _V = logits_BNV.shape
        draws = [torch.rand(N, generator=make_generator(self.seed, "token", self.first + b, k)) for b in range(B)]
        u_BN1 = torch.stack(draws).unsqueeze(-1).to(logits_BNV.device)
        return invert_cdf(logits_BNV.softmax(dim=-1), u_BN1).squeeze(-1)

    def draw_gumbel(self, logits_BNV: Tensor, k: int) -> Tensor:
        B, N, V = logits_BNV.shape
        draws = [
            torch.empty(N, V).exponential_(generator=make_generator(self.seed, "gumbel", self.first + b, k))
            for b in range(B)
        ]
        return -torch.stack(draws).to(logits_BNV.device).log()


def invert_cdf(probability: Tensor, u: Tensor) -> Tensor:
    """Index of the first entry along the last dimension whose cumulative probability exceeds u (..., 1) in [0, 1).

    Never an entry of probability 0: such an entry does not raise the sum, and u times the total stays below the total.
    """
    cumulative = probability.cumsum(dim=-1)
    total = cumulative[..., -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    return index.clamp_max(probability.shape[-1] - 1)  # NaN sorts last; the sampler reports it
