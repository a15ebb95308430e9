"""Which experts of a dynamic feed-forward run, from the norms of their outputs or without them.

Letters: T rows, N tokens at hand, E experts, F hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.rng import draw_words, fold_seed
from nextscale.config.transformer import Selection
from nextscale.transformer.feed_forward.routers import select_largest

PRUNED: tuple[Selection, ...] = ("pruned", "pruned-activation")
"""Selections of hidden units, the same ones for every token."""


def select_experts(norms_TE: Tensor, tau: float, selection: Selection | str = "threshold") -> Tensor:
    """A mask (T, E), True where an expert runs; at least one does for each row.

    `norms_TE`: predicted or true norms, 0 or more. `tau` in 0 to 1: the larger, the more experts. threshold, oracle:
    those with p >= (1 - tau) max p (DMoE-VAR, Eq. 3), so 1 gives all and 0 the largest alone, of equal ones the first.
    top-k: the round(tau E) largest, at least one. cumulative: the largest until their sum reaches the share tau of the
    sum of all.
    """
    experts = norms_TE.shape[-1]
    if tau >= 1:
        return torch.ones_like(norms_TE, dtype=torch.bool)
    if selection == "top-k":
        return select_largest(norms_TE, max(1, round(tau * experts)), dim=-1)
    if tau <= 0:
        return select_largest(norms_TE, 1, dim=-1)
    if selection == "cumulative":
        sorted_TE, order_TE = norms_TE.sort(dim=-1, descending=True, stable=True)
        before_TE = sorted_TE.cumsum(dim=-1) - sorted_TE
        runs_TE = before_TE < tau * sorted_TE.sum(dim=-1, keepdim=True)
        runs_TE[:, 0] = True  # where all norms are 0
        return torch.zeros_like(runs_TE).scatter(-1, order_TE, runs_TE)
    return norms_TE >= (1 - tau) * norms_TE.amax(dim=-1, keepdim=True)


def select_random_experts(
    seed: int, block: int, positions: range, experts: int, tau: float, device: torch.device
) -> Tensor:
    """A mask (N, E), True for round(tau E) experts, at least one, at each of these positions of the sequence.

    A draw depends on (seed, block, position) alone, so all images and both branches of guidance have the same experts.
    """
    stream = torch.tensor([block], device=device)
    words_NE = draw_words(fold_seed(seed, "random experts"), stream, positions, experts)[0]
    return select_largest(words_NE, max(1, round(tau * experts)), dim=-1)


def select_units(importance_F: Tensor, share: float) -> Tensor:
    """Indices, ascending, of the most important share of the hidden units; at least one, of equal ones the first.

    Static pruning. UserError where no importance was measured, so that all are 0.
    """
    if not importance_F.any():
        raise UserError(
            "which hidden units matter was not measured for this model; measure it with `nextscale sparsify DIR "
            "--stages routers thresholds`"
        )
    count = max(1, round(share * len(importance_F)))
    return importance_F.argsort(descending=True, stable=True)[:count].sort().values
