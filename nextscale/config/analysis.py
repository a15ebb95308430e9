"""Settings of `nextscale analyse`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config.data import DataConfig
from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class AnalysisConfig:
    """Held-out images of an analysis."""

    num: int = 500
    """Number of held-out images; 0 = all."""
    images: DataConfig = field(default_factory=DataConfig)
    """How images are split; use the settings of training. A token cache has its split."""
    seed: int = 0
    """Seed of the split (use that of training) and of all random choices."""
    batch_size: int = 16
    """Batch size. It changes results by rounding only."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def __post_init__(self) -> None:
        rules = {
            "num must be 0 (all) or more": self.num >= 0,
            "batch_size must be 1 or more": self.batch_size >= 1,
            "seed must lie in 0 to 2^63 - 1": 0 <= self.seed < 2**63,
        }
        check_fields("analysis", self, rules)


@dataclass(frozen=True)
class CopiesConfig:
    """Samples that are compared with the training images."""

    num: int = 500
    """Number of samples, and of held-out images at most."""
    shown: int = 8
    """Number of samples in each half of the picture: the first ones, and the ones nearest to a training image."""
    batch_size: int = 16
    """Batch size. Results do not depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def __post_init__(self) -> None:
        rules = {
            "num must be 2 or more": self.num >= 2,
            "shown must be 1 or more": self.shown >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check_fields("copies", self, rules)


@dataclass(frozen=True)
class ErrorsConfig:
    """Errors that are injected while images are sampled."""

    num: int = 20
    """Number of images that are sampled with errors."""
    scales: tuple[int, ...] = ()
    """Scales that get errors, one at a time, counted from 1: 1 2 3. Empty = all but the last."""
    share: float = 1.0
    """Share of the scale's tokens that are replaced by random ones; at least one token."""
    shown: int = 1
    """Number of images in the figure."""
    batch_size: int = 16
    """Batch size. Results do not depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def __post_init__(self) -> None:
        rules = {
            "num must be 1 or more": self.num >= 1,
            "scales must be numbers from 1": all(scale >= 1 for scale in self.scales),
            "share must lie above 0, up to 1": 0 < self.share <= 1,
            "shown must be 1 or more": self.shown >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check_fields("errors", self, rules)


@dataclass(frozen=True)
class DynamicAnalysisConfig:
    """Settings of sampling that an analysis of dynamic experts compares."""

    taus: tuple[float, ...] = (0.9, 0.8, 0.7, 0.5)
    """Thresholds to compare, each for all sparse scales. All experts and --tau or --budget are compared, too."""
    num: int = 64
    """Number of images, of all classes in turn, over which FLOPs are averaged."""
    columns: int = 8
    """Number of images in the figure."""
    batch_size: int = 16
    """Batch size. Results do not depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def __post_init__(self) -> None:
        rules = {
            "taus must list numbers of 0 to below 1": len(self.taus) > 0 and all(0 <= tau < 1 for tau in self.taus),
            "num must be 1 or more": self.num >= 1,
            "columns must be 1 or more": self.columns >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check_fields("dynamic", self, rules)
