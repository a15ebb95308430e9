"""What the analyses share as settings. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config import DataConfig
from nextscale.config_dict import check


@dataclass(frozen=True)
class AnalysisConfig:
    """Which held-out images a model is shown, and how."""

    num: int = 500
    """Held-out images; 0 = all that there are."""
    images: DataConfig = field(default_factory=DataConfig)
    """How pictures are split: as in training, so that the same ones are held out. A token cache is split already."""
    seed: int = 0
    """Of the split, as in training, and of all that is drawn."""
    batch_size: int = 16
    """Images at once. It does not change what comes out beyond rounding."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        rules = {
            "num must be 0 (all) or more": self.num >= 0,
            "batch_size must be 1 or more": self.batch_size >= 1,
            "seed must lie in 0 to 2^63 - 1": 0 <= self.seed < 2**63,
        }
        check("analysis", self, rules)


@dataclass(frozen=True)
class ErrorsConfig:
    """Which errors are injected while images are drawn."""

    num: int = 20
    """Images that are measured."""
    scales: tuple[int, ...] = ()
    """Scales to disturb, each by itself, counted from 1: 1 2 3. Empty = all but the last."""
    share: float = 1.0
    """Share of the scale's tokens that are replaced by random others; one at least."""
    shown: int = 1
    """How many images the picture shows."""
    batch_size: int = 16
    """Images at once. It does not change an image."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        rules = {
            "num must be 1 or more": self.num >= 1,
            "share must lie above 0, up to 1": 0 < self.share <= 1,
            "shown must be 1 or more": self.shown >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check("errors", self, rules)
