"""Settings of `nextscale sparsify`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig

Stage = Literal["tune", "split", "routers", "adapt", "thresholds"]
STAGES: tuple[Stage, ...] = ("tune", "split", "routers", "adapt", "thresholds")
_OPTIONAL: Stage = "adapt"
"""Ours, and left out unless asked for: DMoE-VAR does not train the model once experts are chosen."""
PUBLISHED: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage != _OPTIONAL)


def _tuning() -> TrainConfig:
    return TrainConfig(
        epochs=2, batch_size=512, learning_rate=2e-5, final_learning_rate=1e-5, schedule="linear", flat=0.0,
        warmup_epochs=0.2, weight_decay=0.05, clip=1.0,
    )  # fmt: skip


def _routers() -> TrainConfig:
    return TrainConfig(
        epochs=2, batch_size=256, learning_rate=1e-3, final_learning_rate=1e-3, warmup_steps=0, weight_decay=0.0,
        clip=1.0, label_drop=0.5,
    )  # fmt: skip


@dataclass(frozen=True)
class SparsifyConfig:
    """From a trained model to dynamic experts (DMoE-VAR, arXiv 2510.08629), stage by stage."""

    stages: tuple[Stage, ...] = PUBLISHED
    """Which stages to do, in this order: tune (ReLU and Hoyer penalty), split (FFNs into experts), routers (their
    training), adapt (optional: the model learns to do with the experts that run at `budget`), thresholds (the table of
    budgets). Those left out must have been done by the model that is given."""
    data: str = ""
    """A token cache, or images ('digits', a folder, parquet, owner/name on the hub). Empty = samples of the model."""
    samples: int = 5000
    """Without data: how many images the model draws for itself."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How it draws them."""
    images: DataConfig = field(default_factory=DataConfig)
    """How pictures are cut and split; a token cache is already."""
    tune: Literal["all", "late", "none"] = "all"
    """What becomes ReLU and is tuned: the whole model (the paper); the FFNs of the sparse scales alone, which are then
    kept beside the dense ones; or nothing: then experts are divided of the FFNs as they are."""
    hoyer: float = 0.1
    """Weight of the Hoyer penalty beside the cross-entropy (Eq. 1), mean over blocks and tokens."""
    scales: int = 3
    """How many of the last scales are sparse."""
    expert_size: int = 128
    """Hidden units of an expert; must divide the FFN's width."""
    router_width: int = 128
    """Hidden width of the routers."""
    tuning: TrainConfig = field(default_factory=_tuning)
    routers: TrainConfig = field(default_factory=_routers)
    """label_drop 0.5, because guidance runs both branches."""
    adapting: TrainConfig = field(default_factory=_tuning)
    """Of stage adapt."""
    budgets: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
    """Shares of the dense model's FLOPs that thresholds are calibrated for."""
    budget: float = 0.8
    """The share whose thresholds the model uses unless it is told otherwise; 0 = all experts."""
    calibration_images: int = 256
    """Held-out images that thresholds are calibrated on, at most."""
    batch_size: int = 8
    """Images at once in calibration and in drawing samples. It does not change what comes out beyond rounding."""
    seed: int = 0
    """Of the clusters, the routers' start and the split of pictures; trainings have seeds of their own."""

    def __post_init__(self) -> None:
        rules = {
            "stages must name at least one": len(self.stages) > 0,
            "samples must be 20 or more": self.samples >= 20,
            "hoyer must be 0 or more": 0 <= self.hoyer < float("inf"),
            "scales must be 1 or more": self.scales >= 1,
            "expert_size must be 1 or more": self.expert_size >= 1,
            "router_width must be 1 to 2^16": 1 <= self.router_width <= 2**16,
            "budgets must list shares above 0, up to 1": all(0 < b <= 1 for b in self.budgets),
            "budget must lie in 0 to 1": 0 <= self.budget <= 1,
            "calibration_images must be 1 or more": self.calibration_images >= 1,
            "batch_size must be 1 or more": self.batch_size >= 1,
        }
        check_fields("sparsify", self, rules)
        first, last = (STAGES.index(self.stages[i]) for i in (0, -1))
        whole = STAGES[first : last + 1]
        if self.stages not in (whole, tuple(stage for stage in whole if stage != _OPTIONAL)):
            raise UserError(f"sparsify: stages must follow one another as {', '.join(STAGES)}; got {self.stages}")
        if "adapt" in self.stages and not self.budget:
            raise UserError("sparsify: stage adapt needs a budget, the share of the FLOPs that the model adapts to")
