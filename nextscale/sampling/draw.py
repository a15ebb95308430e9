"""Drawing tokens from random streams of each image's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.rng import draw_words, fold_seed
from nextscale.pyramid import Pyramid

if TYPE_CHECKING:
    from nextscale.sampling.gumbel import GumbelNoise

_TOTAL = 2**30
"""What probabilities are integer multiples of the inverse of, while a token is drawn."""


class RandomSource(Protocol):
    """Where randomness comes from. At each scale `draw_tokens` is called first, then, in smooth mode, `draw_gumbel`."""

    def draw_tokens(self, logits_BNV: Tensor, k: int) -> Tensor:
        """Draw one token per row from softmax(logits): int64 (B, N)."""

    def draw_gumbel(self, logits_BNV: Tensor, k: int) -> Tensor:
        """Gumbel noise of the logits' shape."""


class PerImageRandom:
    """Numbers that are functions of (seed, number of the image, position, token): an image depends neither on its batch
    nor on the device. Image b of the batch is number `first + b`; the position counts the tokens of all scales.

    All numbers are integers, computed on `device` with the same bits everywhere. Gumbel noise is made of them by two
    logarithms, whose last bit may differ between devices.
    """

    def __init__(self, seed: int, pyramid: Pyramid, batch: int, device: torch.device, first: int = 0):
        if first + batch >= 2**63:
            raise UserError(f"first_image must lie below 2^63 - {batch}; got {first}")
        self.seed, self.pyramid = seed, pyramid
        self._images_B = torch.arange(first, first + batch, device=device)
        self._token_words_BL = draw_words(fold_seed(seed, "token"), self._images_B, range(1), pyramid.length)[:, 0]
        self._noise: GumbelNoise | None = None

    def draw_tokens(self, logits_BNV: Tensor, k: int) -> Tensor:
        return invert_cdf(logits_BNV, self._token_words_BL[:, slice(*self.pyramid.spans[k])])

    def draw_gumbel(self, logits_BNV: Tensor, k: int) -> Tensor:
        if self._noise is None:
            from nextscale.sampling.gumbel import GumbelNoise

            self._noise = GumbelNoise(self.seed, self.pyramid, self._images_B)
        return self._noise.draw(k, logits_BNV.shape[-1])


def invert_cdf(logits_BNV: Tensor, word_BN: Tensor) -> Tensor:
    """The token (B, N) at which the cumulative softmax(logits) first exceeds word / 2^32; `word_BN`: 0 to 2^32 - 1.

    Probabilities are rounded down to multiples of 2^-30 and added up as integers, so the order of the sum does not
    matter, and rounding moves no border between tokens by more than its own rounding. Never a token of probability 0.
    """
    cumulative_BNV = logits_BNV.softmax(dim=-1).mul_(_TOTAL).to(torch.int32).cumsum_(dim=-1)
    target_BN1 = (word_BN.unsqueeze(-1) * cumulative_BNV[..., -1:]) >> 32  # below the sum
    index_BN1 = torch.searchsorted(cumulative_BNV, target_BN1.to(torch.int32), right=True)
    return index_BN1.squeeze(-1).clamp_max(logits_BNV.shape[-1] - 1)  # after NaN; the sampler reports it
