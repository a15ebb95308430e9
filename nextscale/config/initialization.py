"""Settings of the initialisation. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class InitConfig:
    """Gains on VAR's initial weights. The published recipes lower `adaln_gamma` with depth (1e-3 for d16)."""

    adaln: float = 0.5
    """Gain on the adaLN projections, except for the rows below."""
    adaln_gamma: float = 1e-3
    """Gain on the rows that scale the outputs of mixers and FFN: near 0, every block starts as the identity."""
    head: float = 0.02
    """Gain on the output head: near 0, the first predictions are almost uniform."""

    def __post_init__(self) -> None:
        gains = ("adaln", "adaln_gamma", "head")
        check_fields("init", self, {f"{name} must be 0 or more": getattr(self, name) >= 0 for name in gains})
