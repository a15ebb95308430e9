"""Thresholds of dynamic experts for a FLOPs budget, from the table that calibration stored with the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.parse import check_fields, from_dict, quote_value
from nextscale.config.sampling import SampleConfig

_NEAR = 0.01
"""A budget this little below the lowest share uses that share: calibration meets its targets about as closely."""


@dataclass(frozen=True)
class Budget:
    """One row of the calibrated table."""

    share: float
    """FLOPs of the transformer over those of the dense one, routers and guidance included."""
    tau: tuple[float, ...]
    """Of each sparse scale, coarse to fine."""

    def __post_init__(self) -> None:
        rules = {
            "share must lie above 0, up to 2": 0 < self.share <= 2,
            "tau must list numbers of 0 to 1": bool(self.tau) and all(0 <= tau <= 1 for tau in self.tau),
        }
        check_fields("budgets", self, rules)


@dataclass(frozen=True)
class _Calibration:
    """What calibration stored with a checkpoint."""

    budgets: tuple[Budget, ...] = ()


def read_budgets(origin: Mapping[str, Any]) -> list[Budget]:
    """The table in a checkpoint's `origin`, largest share first; empty where none was calibrated."""
    try:
        dynamic = origin.get("dynamic", {})
        if not isinstance(dynamic, dict):
            raise UserError(f"origin.dynamic is {quote_value(dynamic)}; it must be a table")
        table = {name: value for name, value in dynamic.items() if name == "budgets"}
        budgets = from_dict(_Calibration, table, "origin.dynamic").budgets
        if len({row.share for row in budgets}) < len(budgets) or len({len(row.tau) for row in budgets}) > 1:
            raise UserError("budgets must have different shares, and thresholds for the same scales")
    except UserError as error:
        raise UserError(f"the checkpoint's table of budgets cannot be read ({error}); calibrate it anew") from error
    return sorted(budgets, key=lambda row: -row.share)


def interpolate_tau(origin: Mapping[str, Any], budget: float) -> tuple[float, ...]:
    """The thresholds for this share of the dense FLOPs, interpolated linearly between two rows of the table.

    UserError when the checkpoint has no table, or it does not reach so far.
    """
    table = read_budgets(origin)
    if not table:
        raise UserError(
            f"budget={budget}: no thresholds were calibrated for this checkpoint; make it with `nextscale sparsify` "
            "(stage thresholds), or set tau"
        )
    if budget >= table[0].share:
        return table[0].tau
    for above, below in pairwise(table):
        if below.share <= budget:
            fraction = (above.share - budget) / (above.share - below.share)
            return tuple(a + fraction * (b - a) for a, b in zip(above.tau, below.tau, strict=True))
    if budget >= table[-1].share - _NEAR:
        return table[-1].tau
    raise UserError(
        f"budget={budget} is below what was calibrated for this checkpoint: {table[-1].share:.3f} to "
        f"{table[0].share:.3f}"
    )


def resolve_budget(settings: SampleConfig, origin: Mapping[str, Any]) -> SampleConfig:
    """The settings with thresholds in place of a budget. UserError with a refiner: shares are those of one model."""
    if not settings.budget:
        return settings
    if settings.draft_scales:
        raise UserError(
            "budget cannot be combined with draft_scales: it is a share of the FLOPs of one model at all scales, and "
            "the refiner computes some of them; set tau instead"
        )
    return replace(settings, budget=0.0, tau=interpolate_tau(origin, settings.budget))
