"""Smooth mode: a Gumbel-softmax mixture of codes in place of one code per token."""

from __future__ import annotations

from torch import Tensor

from nextscale.sampling.draw import RandomSource
from nextscale.tokenizer.tokenizer import Tokenizer


class SmoothEmbedding:
    """Embeds the distribution of a token instead of the token (the official code's `more_smooth`).

    The mixture sharpens towards the last scale. Its images look smoother and do not match their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, random: RandomSource):
        self.tokenizer, self.random = tokenizer, random

    def __call__(self, tokens_BN: Tensor, logits_BNV: Tensor, k: int) -> Tensor:
        ratio = self.tokenizer.pyramid.progress(k)
        temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
        noisy_BNV = logits_BNV * (1 + ratio) + self.random.draw_gumbel(logits_BNV, k)
        return self.tokenizer.quantizer.mix_codes((noisy_BNV / temperature).softmax(dim=-1))
