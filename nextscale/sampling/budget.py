"""From a share of the dense model's FLOPs to thresholds: what was calibrated is kept with the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig

_NEAR = 0.01
"""A budget this little below the lowest share is that one: calibration meets its targets about so well."""


@dataclass(frozen=True)
class Budget:
    """One line of the calibrated table."""

    share: float
    """FLOPs of the transformer over those of the dense one, routers and guidance counted."""
    tau: tuple[float, ...]
    """Of each sparse scale, coarse to fine."""


def table_of(origin: Mapping[str, Any]) -> list[Budget]:
    """The table in a checkpoint's `origin`, from the dense model down; empty where none was calibrated."""
    rows = origin.get("dynamic", {}).get("budgets", []) if isinstance(origin.get("dynamic", {}), dict) else []
    try:
        found = [Budget(float(row["share"]), tuple(float(t) for t in row["tau"])) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint's table of budgets cannot be read ({error}); calibrate it anew") from error
    return sorted(found, key=lambda row: -row.share)


def tau_for(origin: Mapping[str, Any], budget: float) -> tuple[float, ...]:
    """The thresholds for this share of the dense FLOPs, between two lines of the table in proportion.

    UserError when the checkpoint has no table, or it does not reach so far.
    """
    table = table_of(origin)
    if not table:
        raise UserError(
            f"budget={budget}: no thresholds were calibrated for this checkpoint; make it with `nextscale sparsify` "
            "(stage thresholds), or say tau"
        )
    if budget >= table[0].share:
        return table[0].tau
    for above, below in pairwise(table):
        if below.share <= budget:
            part = (above.share - budget) / (above.share - below.share)
            return tuple(a + part * (b - a) for a, b in zip(above.tau, below.tau, strict=True))
    if budget >= table[-1].share - _NEAR:
        return table[-1].tau
    raise UserError(
        f"budget={budget} is below what was calibrated for this checkpoint: {table[-1].share:.3f} to "
        f"{table[0].share:.3f}"
    )


def resolved(settings: SampleConfig, origin: Mapping[str, Any]) -> SampleConfig:
    """The settings with thresholds in place of a budget."""
    if not settings.budget:
        return settings
    return replace(settings, budget=0.0, tau=tau_for(origin, settings.budget))
