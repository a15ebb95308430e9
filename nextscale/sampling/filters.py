"""Logits processors: temperature, top-k and top-p. No host synchronisation, no change in place.

Your own processor is any function of the logits and the scale. It is applied after guidance and before the filters of
this file, whose values may differ from scale to scale (a list, or a function of the scale):

    >>> def forbid_token_0(logits_BNV, k):
    ...     logits_BNV = logits_BNV.clone()
    ...     logits_BNV[..., 0] = -torch.inf
    ...     return logits_BNV
    >>> images = pipeline.sample(
    ...     [1, 2],
    ...     cfg=lambda k: 0.0 if k == 0 else 1.5,
    ...     temperature=[1.0, 1.0, 1.0, 0.9],
    ...     logits_processors=[forbid_token_0],
    ... )
    >>> bool((images.tokens == 0).any())
    False

Letters: B batch, N tokens of one scale, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nextscale.config.sampling import SampleConfig, list_per_scale
from nextscale.sampling.sampler import LogitsProcessor


class Temperature:
    """Divides logits by the scale's temperature."""

    def __init__(self, temperatures: Sequence[float]):
        self.temperatures = temperatures

    def __call__(self, logits_BNV: Tensor, k: int) -> Tensor:
        temperature = self.temperatures[k]
        return logits_BNV if temperature == 1 else logits_BNV / temperature


class TopKTopP:
    """Top-k, then top-p with the scale's values; 0 turns either off."""

    def __init__(self, top_ks: Sequence[int], top_ps: Sequence[float]):
        self.top_ks, self.top_ps = top_ks, top_ps

    def __call__(self, logits_BNV: Tensor, k: int) -> Tensor:
        top_k, top_p = self.top_ks[k], self.top_ps[k]
        if top_k > 0 and top_p > 0:
            return filter_top_k_top_p(logits_BNV, top_k, top_p)
        if top_k > 0:
            return filter_top_k(logits_BNV, top_k)
        return filter_top_p(logits_BNV, top_p) if top_p > 0 else logits_BNV


def build_filters(settings: SampleConfig, scales: int) -> list[LogitsProcessor]:
    """The processors of these settings, in the order in which they are applied."""
    return [
        Temperature(list_per_scale("temperature", settings.temperature, scales)),
        TopKTopP(
            list_per_scale("top_k", settings.top_k, scales),
            list_per_scale("top_p", settings.top_p, scales),
        ),
    ]


def select_largest(logits: Tensor, k: int) -> Tensor:
    """The k largest values of each row, ascending (..., k).

    On a CPU in float32 by NumPy, which sorts 512 values in a thirtieth of torch's time and selects 900 of 4,096 in a
    ninth: with torch's functions this would be an eighth of a small model's sampling time.
    """
    k = min(k, logits.shape[-1])
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.topk(k, dim=-1).values.flip(-1)
    values = logits.detach().numpy()
    if k < values.shape[-1]:
        values = np.partition(values, -k, axis=-1)[..., -k:]
    return torch.from_numpy(np.sort(values, axis=-1))


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest to -inf; whatever ties with the k-th stays."""
    return logits.masked_fill(logits < select_largest(logits, k)[..., :1], -torch.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Drop the least likely tokens while together they have a probability of at most 1 - p; the likeliest stays, and
    whatever ties with the least likely one that stays."""
    return filter_top_k_top_p(logits, logits.shape[-1], p)


def filter_top_k_top_p(logits: Tensor, k: int, p: float) -> Tensor:
    """`filter_top_k`, then `filter_top_p`, sorting no more than k values."""
    ordered = select_largest(logits, k)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - p)
    drop[..., -1:] = False
    return logits.masked_fill(logits < ordered.masked_fill(drop, torch.inf).amin(dim=-1, keepdim=True), -torch.inf)
