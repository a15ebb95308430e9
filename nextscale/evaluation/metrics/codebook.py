"""Usage and perplexity of a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.common.precision import widen
from nextscale.pyramid import Pyramid


@dataclass
class CodebookUsage:
    """Counts of codes per scale (K, V), summed over batches of tokens."""

    counts_KV: Tensor

    @classmethod
    def empty(cls, pyramid: Pyramid, vocab_size: int) -> CodebookUsage:
        return cls(torch.zeros(len(pyramid), vocab_size, dtype=torch.int64))

    def add(self, tokens_BL: Tensor, pyramid: Pyramid) -> None:
        """Count a batch of tokens."""
        self.counts_KV += count_codes(tokens_BL, pyramid, self.counts_KV.shape[1]).cpu()

    def report(self) -> dict[str, Any]:
        """Usage (share of the codes that occur) and perplexity, over all scales and for each scale."""
        total_V = self.counts_KV.sum(dim=0)
        return {
            "codebook": self.counts_KV.shape[1],
            "usage": compute_usage(total_V),
            "perplexity": compute_perplexity(total_V),
            "usage_per_scale": [compute_usage(c) for c in self.counts_KV],
            "perplexity_per_scale": [compute_perplexity(c) for c in self.counts_KV],
        }


def count_codes(tokens_BL: Tensor, pyramid: Pyramid, vocab_size: int) -> Tensor:
    """How often each code occurs at each scale: int64 (K, V)."""
    counts_KV = tokens_BL.new_zeros(len(pyramid), vocab_size)
    for counts_V, (start, end) in zip(counts_KV, pyramid.spans, strict=True):  # bincount would wait for the device
        index_R = tokens_BL[:, start:end].flatten()
        counts_V.scatter_add_(0, index_R, torch.ones_like(index_R))
    return counts_KV


def compute_usage(counts_V: Tensor) -> float:
    """Share of codes that occur."""
    return float(widen(counts_V > 0).mean())


def compute_perplexity(counts_V: Tensor) -> float:
    """exp of the entropy of the code frequencies, 1 to V: the number of equally frequent codes of that entropy."""
    p = widen(counts_V) / counts_V.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp())
