"""Functions over logits (B, N, V): guidance and filters. No host synchronisation, no change in place."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: (1 + t) conditional - t unconditional."""
    return (1 + strength) * conditional - strength * unconditional


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest to -inf; whatever ties with the k-th stays."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Drop the least likely tokens while together they have a probability of at most 1 - p; the likeliest stays."""
    ordered, index = logits.sort(dim=-1, descending=False)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - p)
    drop[..., -1:] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)


def keep_top_k_top_p(logits: Tensor, k: int, p: float) -> Tensor:
    """`keep_top_k`, then `keep_top_p`, sorting no more than k; whatever ties with the least likely one kept stays."""
    ordered = logits.topk(min(k, logits.shape[-1]), dim=-1).values.flip(-1)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - p)
    drop[..., -1:] = False
    return logits.masked_fill(logits < ordered.masked_fill(drop, torch.inf).amin(dim=-1, keepdim=True), -torch.inf)


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, then top-k, then top-p; 0 turns either filter off."""
    if temperature != 1:
        logits = logits / temperature
    if top_k > 0 and top_p > 0:
        return keep_top_k_top_p(logits, top_k, top_p)
    if top_k > 0:
        return keep_top_k(logits, top_k)
    return keep_top_p(logits, top_p) if top_p > 0 else logits
