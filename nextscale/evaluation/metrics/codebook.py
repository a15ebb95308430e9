"""How well a codebook is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.pyramid import Pyramid


@dataclass
class CodebookUse:
    """Counts of codes per scale (K, V), gathered over batches of tokens."""

    counts_KV: Tensor

    @classmethod
    def empty(cls, pyramid: Pyramid, vocab_size: int) -> CodebookUse:
        return cls(torch.zeros(len(pyramid), vocab_size, dtype=torch.int64))

    def add(self, tokens_BL: Tensor, pyramid: Pyramid) -> None:
        """Count a batch of tokens."""
        self.counts_KV += counts(tokens_BL, pyramid, self.counts_KV.shape[1]).cpu()

    def report(self) -> dict[str, Any]:
        """Usage (share of the codebook that occurs) and perplexity, over all scales together and per scale."""
        total_V = self.counts_KV.sum(dim=0)
        return {
            "codebook": self.counts_KV.shape[1],
            "usage": usage(total_V),
            "perplexity": perplexity(total_V),
            "usage_per_scale": [usage(c) for c in self.counts_KV],
            "perplexity_per_scale": [perplexity(c) for c in self.counts_KV],
        }


def counts(tokens_BL: Tensor, pyramid: Pyramid, vocab_size: int) -> Tensor:
    """How often each code occurs at each scale: int64 (K, V)."""
    return torch.stack([torch.bincount(tokens_BL[:, a:b].flatten(), minlength=vocab_size) for a, b in pyramid.spans])


def usage(counts_V: Tensor) -> float:
    """Share of codes that occur."""
    return float((counts_V > 0).double().mean())


def perplexity(counts_V: Tensor) -> float:
    """exp of the entropy of the codes: how many equally frequent codes would be as varied. 1 to V."""
    p = counts_V.double() / counts_V.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp())
