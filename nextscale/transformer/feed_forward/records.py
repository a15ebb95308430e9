"""What dynamic FFNs record of a pass: values that come back with its output, never the state of a module.

- nothing without thresholds, which is all experts at every scale;
- `Activity` with them: how much ran (`ExpertSelection` until it is counted);
- `Sparsity` and `Norms` where `Thresholds.record` asks for them, for tuning and for the training of routers;
- `UnitContribution`: how much each hidden unit contributed.

Letters: B sequences, N tokens at hand, F hidden units of one FFN, E experts that it is divided into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activity:
    """How much ran for each token."""

    units_BN: Tensor
    """int64: hidden units that ran."""
    routed_BN: Tensor
    """int64: 1 where a router that predicts norms chose the experts, else 0."""

    def share_BN(self, width: int) -> Tensor:
        """Share of the hidden units that ran, float64. `width`: hidden units of an FFN."""
        return self.units_BN.double() / width


@dataclass(frozen=True)
class ExpertSelection:
    """Which experts of one FFN ran, not yet counted: sampling does not need the counts."""

    chosen_BNE: Tensor
    size: int
    """Hidden units of an expert."""
    routed: bool

    def activity(self) -> Activity:
        """The same, counted."""
        units_BN = self.chosen_BNE.sum(dim=-1) * self.size
        return Activity(units_BN, torch.full_like(units_BN, int(self.routed)))


@dataclass(frozen=True)
class Sparsity:
    """How sparse the hidden units were."""

    hoyer: Tensor
    """Mean over tokens of (|a|_1 / |a|_2)^2, 1 for one active unit to F for equal ones (the square Hoyer penalty)."""
    zeros: Tensor
    """Share of the hidden units that were 0."""


@dataclass(frozen=True)
class Norms:
    """What a router predicts, and what it should have."""

    predicted_BNE: Tensor
    true_BNE: Tensor
    """|W2_e a_e|_2 of each expert; no gradients."""


@dataclass(frozen=True)
class UnitContribution:
    """How much each hidden unit contributed."""

    contribution_F: Tensor
    """Sum over tokens of |a_j| |column j of W2|_2, float64."""


R = TypeVar("R", Activity, Sparsity, Norms, UnitContribution)


def recorded(records: Sequence[Sequence[Any]], kind: type[R]) -> list[R]:
    """What each block's FFN recorded, where it is of this kind."""
    found = (counted(record) for block in records for record in block)
    return [record for record in found if isinstance(record, kind)]


def counted(record: Any) -> Any:
    """An FFN's record with what ran as `Activity`."""
    return record.activity() if isinstance(record, ExpertSelection) else record


def joined(records: list[Any]) -> Any:
    """The record of the whole pass from those of its pieces, which are of one kind; None of none."""
    if len(records) < 2:
        return records[0] if records else None
    records = [counted(record) for record in records]
    assert all(isinstance(r, type(records[0])) for r in records), "pieces of one pass record alike"
    if isinstance(records[0], Activity):
        return Activity(*(_along_tokens(records, name) for name in ("units_BN", "routed_BN")))
    assert isinstance(records[0], Norms), "sparsity and use are recorded in one piece"
    return Norms(*(_along_tokens(records, name) for name in ("predicted_BNE", "true_BNE")))


def _along_tokens(records: list[Any], name: str) -> Tensor:
    return torch.cat([getattr(r, name) for r in records], dim=1)
