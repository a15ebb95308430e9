"""Settings of `nextscale tune`. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig

Clock = Literal["wall", "processor"]
"""wall: the time that passes. processor: the time that the CPU works for this process."""
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class TuneConfig:
    """What is searched, and how long."""

    max_loss: float = 0.01
    """Largest share by which the Fréchet distance may rise."""
    seconds: float = 1800.0
    """Time for all measurements."""
    batch: int = 8
    """Batch size for which the time is measured."""
    shard: int = 250
    """Images that are measured at once."""
    clock: Clock = "wall"
    """Which time is measured: that which passes, or the processor's for this process."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """The settings of the dense model; what is searched changes them."""
    images: ReadConfig = field(default_factory=ReadConfig)
    """How the reference is read."""

    def __post_init__(self) -> None:
        rules = {
            "max_loss must lie in 0 to 1": 0 <= self.max_loss <= 1,
            "seconds must be above 0": self.seconds > 0,
            "batch must be 1 or more": self.batch >= 1,
            "shard must be 2 or more": self.shard >= 2,
        }
        check_fields("tune", self, rules)


def check_base(settings: SampleConfig) -> None:
    """UserError for settings of the dense model that `nextscale tune` chooses itself."""
    chosen = {
        "--draft-scales": settings.draft_scales,
        "--prune": any(settings.prune),
        "--tau": settings.tau,
        "--budget": settings.budget,
        "--selection": settings.selection != "threshold",
        "--cfg-scales": settings.cfg_scales,
    }
    for option, given in chosen.items():
        if given:
            raise UserError(f"{option} is one of the settings that tune chooses: leave it out")
    if settings.official_seeding:
        raise UserError("--official-seeding makes an image depend on its batch: tune compares images one by one")


def parse_share(option: str, text: str) -> float:
    """The share that a user types for `option`: 1% or 0.01."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    if match is None:
        raise UserError(f"{option} takes a share such as 1% or 0.01; got '{text}'")
    return float(match[1]) / (100 if match[2] else 1)


def parse_duration(option: str, text: str) -> float:
    """The seconds that a user types for `option`: 90s, 30m, 2h, 1h30m, or a number of seconds."""
    parts = re.findall(r"(\d+\.?\d*|\.\d+)([smh]?)", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise UserError(f"{option} takes a time such as 90s, 30m or 1h30m; got '{text}'")
    return sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
