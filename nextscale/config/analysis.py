"""What the analyses share as settings. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config.data import DataConfig
from nextscale.config.parse import check_fields


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
        check_fields("analysis", self, rules)


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
        check_fields("errors", self, rules)


@dataclass(frozen=True)
class DynamicAnalysisConfig:
    """At which settings a model with dynamic experts is shown."""

    taus: tuple[float, ...] = (0.9, 0.8, 0.7, 0.5)
    """Thresholds, each for all sparse scales, beside all experts and what --tau or --budget say."""
    num: int = 64
    """Images over which FLOPs are averaged, of all classes in turn."""
    columns: int = 8
    """How many of them the picture shows."""
    batch_size: int = 16
    """Images at once. It does not change an image."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        rules = {
            "taus must list numbers of 0 to below 1": len(self.taus) > 0 and all(0 <= tau < 1 for tau in self.taus),
            "num must be 1 or more": self.num >= 1,
            "columns must be 1 or more": self.columns >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check_fields("dynamic", self, rules)
