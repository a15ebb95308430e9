"""Which experts of a dynamic feed-forward run, from the norms of their outputs.

Letters: T rows, E experts, F hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.config.transformer import Selection
from nextscale.transformer.feed_forward.routers import select_largest


def select_experts(norms_TE: Tensor, tau: float, selection: Selection | str = "threshold") -> Tensor:
    """A mask (T, E), True where an expert runs; at least one does for each row.

    `norms_TE`: predicted or true norms, 0 or more. `tau` in 0 to 1: the larger, the more experts. threshold, oracle:
    those with p >= (1 - tau) max p (DMoE-VAR, Eq. 3), so 1 gives all and 0 the largest alone, of equal ones the first.
    top-k: the round(tau E) largest, at least one.
    """
    experts = norms_TE.shape[-1]
    if tau >= 1:
        return torch.ones_like(norms_TE, dtype=torch.bool)
    if selection == "top-k":
        return select_largest(norms_TE, max(1, round(tau * experts)), dim=-1)
    if tau <= 0:
        return select_largest(norms_TE, 1, dim=-1)
    return norms_TE >= (1 - tau) * norms_TE.amax(dim=-1, keepdim=True)


def select_units(importance_F: Tensor, share: float) -> Tensor:
    """Indices, ascending, of the most important share of the hidden units; at least one. Static pruning."""
    count = max(1, round(share * len(importance_F)))
    return importance_F.argsort(descending=True, stable=True)[:count].sort().values
