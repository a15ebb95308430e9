"""What dynamic feed-forwards report of a pass; `nextscale.transformer.feed_forward.Record` holds it.

Letters: B sequences, N tokens at hand, F hidden units of one FFN, E experts that it is divided into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.common.precision import widen


@dataclass(frozen=True)
class Activity:
    """How much of an FFN worked on each token."""

    units_BN: Tensor
    """int64: hidden units that worked."""
    routed_BN: Tensor
    """int64: 1 where a router that predicts norms selected the experts, else 0."""

    def share_BN(self, width: int) -> Tensor:
        """Share of the hidden units that worked, float64 where the device has it. `width`: hidden units of an FFN."""
        return widen(self.units_BN) / width

    def select(self, span: tuple[int, int]) -> Activity:
        """The activity of the positions start to end - 1."""
        start, end = span
        return Activity(self.units_BN[:, start:end], self.routed_BN[:, start:end])


@dataclass(frozen=True)
class ExpertSelection:
    """Which experts worked on each token. Sampling leaves it uncounted, as it needs no counts."""

    selected_BNE: Tensor
    """bool."""
    size: int
    """Hidden units of an expert."""
    routed: bool
    """Whether a router that predicts norms selected them."""


def count_activity(selections: Sequence[ExpertSelection]) -> Activity:
    """The activity of tokens that follow one another, from the selections of their groups."""
    units = [s.selected_BNE.sum(dim=-1) * s.size for s in selections]
    routed = [torch.full_like(u, int(s.routed)) for u, s in zip(units, selections, strict=True)]
    return Activity(torch.cat(units, dim=1), torch.cat(routed, dim=1))


@dataclass(frozen=True)
class Sparsity:
    """How sparse the hidden units were."""

    hoyer: Tensor
    """Mean over tokens of (|a|_1 / |a|_2)^2, 1 for one active unit to F for equal ones (the square Hoyer penalty)."""
    zeros: Tensor
    """Share of the hidden units that were 0."""


@dataclass(frozen=True)
class Norms:
    """What a router predicts, and its target."""

    predicted_BNE: Tensor
    true_BNE: Tensor
    """|W2_e a_e|_2 of each expert; no gradients."""


@dataclass(frozen=True)
class UnitContribution:
    """How much each hidden unit contributed; sums over tokens, float64 where the device has it."""

    contribution_F: Tensor
    """Of |a_j| |column j of W2|_2."""
    activation_F: Tensor
    """Of a_j, with its sign."""
