"""Gumbel noise for smooth mode, a function of (seed, number of the image, position, token)."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.rng import draw_words, fold_seed
from nextscale.pyramid import Pyramid

_ON_CPU, _ON_OTHERS = 2**18, 2**22
"""How many numbers are computed at once: on a CPU so few that they stay in its caches."""


class GumbelNoise:
    """The noise of the images with these numbers, computed on the device of `images_B` in parts of all scales."""

    def __init__(self, seed: int, pyramid: Pyramid, images_B: Tensor):
        self.seed, self.pyramid, self.images_B = fold_seed(seed, "gumbel"), pyramid, images_B
        self._last = (-1, torch.empty(0))
        """Number and content of the last part that was used: one part may serve several small scales."""

    def draw(self, k: int, codes: int) -> Tensor:
        """The noise of scale k, float32 (B, N, codes)."""
        (start, end), images = self.pyramid.spans[k], len(self.images_B)
        size = max(1, (_ON_CPU if self.images_B.device.type == "cpu" else _ON_OTHERS) // (images * codes))
        parts = []
        for number in range(start // size, -(-end // size)):
            noise_BRV = self._compute_part(number, size, codes)
            parts.append(noise_BRV[:, max(0, start - number * size) : end - number * size])
        return torch.cat(parts, dim=1)

    def _compute_part(self, number: int, size: int, codes: int) -> Tensor:
        """Noise (B, R, codes) of the positions from number * size on, at most `size` of them."""
        if self._last[0] != number:
            rows = range(number * size, min((number + 1) * size, self.pyramid.length))
            self._last = number, compute_gumbel(draw_words(self.seed, self.images_B, rows, codes))
        return self._last[1]


def compute_gumbel(words: Tensor) -> Tensor:
    """Gumbel noise of random words (0 to 2^32 - 1): -log(-log(u)), u an odd multiple of 2^-24, exact in float32."""
    u = (words >> 9).float().mul_(2**-23).add_(2**-24)
    return u.log_().neg_().log_().neg_()
