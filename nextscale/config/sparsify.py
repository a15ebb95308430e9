"""Settings of `nextscale sparsify`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.idle import Idle
from nextscale.config.parse import SEED_RULE, check_fields, is_seed
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import NO_GENERATOR, TrainConfig

Stage = Literal["tune", "split", "routers", "adapt", "thresholds"]
STAGES: tuple[Stage, ...] = ("tune", "split", "routers", "adapt", "thresholds")
_OPTIONAL: Stage = "adapt"
"""Our addition, which runs only on request: DMoE-VAR does not train the model after the experts are selected."""
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
    """Stages that turn a trained dense model into dynamic experts (DMoE-VAR, arXiv 2510.08629)."""

    stages: tuple[Stage, ...] = PUBLISHED
    """Stages to run, in this order: tune (train with ReLU and Hoyer penalty), split (FFNs into experts), routers (train
    them), adapt (optional: train with only the experts that run at `budget`), thresholds (calibrate them for the
    budgets). The given model must have passed the stages before the first."""
    data: str = ""
    """A token cache, or images ('digits', a folder, parquet, owner/name on the hub). Empty = samples of the model."""
    samples: int = 5000
    """Without data: number of images that the model samples."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """Settings of that sampling."""
    images: DataConfig = field(default_factory=DataConfig)
    """How images are cropped and split into training and held-out ones. A token cache needs neither."""
    tune: Literal["late", "all", "none"] = "late"
    """What is tuned with ReLU. late: only FFNs for the sparse scales, stored beside the dense ones; earlier scales stay
    those of the dense model, as in the paper. all: the whole model, which changes every scale. none: nothing; the FFNs
    are divided as they are."""
    hoyer: float = 0.1
    """Weight of the Hoyer penalty, a mean over blocks and tokens, in the loss with the cross-entropy (Eq. 1)."""
    scales: int = 3
    """How many of the last scales are sparse."""
    expert_size: int = 128
    """Hidden units of an expert; must divide the FFN's width."""
    router_width: int = 128
    """Hidden width of the routers."""
    tuning: TrainConfig = field(default_factory=_tuning)
    """Training of stage tune."""
    routers: TrainConfig = field(default_factory=_routers)
    """Training of stage routers. label_drop 0.5, because guidance runs both branches."""
    adapting: TrainConfig = field(default_factory=_tuning)
    """Training of stage adapt."""
    budgets: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
    """Shares of the dense model's FLOPs that thresholds are calibrated for."""
    budget: float = 0.8
    """Share of the FLOPs whose thresholds are the model's default in sampling; 0 = all experts."""
    calibration_images: int = 256
    """Largest number of held-out images that thresholds are calibrated on."""
    batch_size: int = 8
    """Batch size of calibration and sampling. It changes results by rounding only."""
    seed: int = 0
    """Seed of clusters, initial routers and the split of images. Trainings have seeds of their own."""

    def __post_init__(self) -> None:
        rules = {
            SEED_RULE: is_seed(self.seed),
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
        complete = STAGES[first : last + 1]
        if self.stages not in (complete, tuple(stage for stage in complete if stage != _OPTIONAL)):
            raise UserError(f"sparsify: stages must follow one another as {', '.join(STAGES)}; got {self.stages}")
        if "adapt" in self.stages and not self.budget:
            raise UserError("sparsify: stage adapt needs a budget, the share of the FLOPs that the model adapts to")
        if "thresholds" in self.stages and not self.budget and not self.budgets:
            raise UserError("sparsify: stage thresholds needs budgets or a budget to calibrate for")

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        routers = tuple(f"routers.{name}" for name in (*NO_GENERATOR[1:], "label_smoothing"))
        idle: dict[str, tuple[str, ...]] = {
            "thresholds of the model are not used in sampling for data": (
                "sampling.tau", "sampling.budget", "sampling.selection",
            ),
            "sparsify draws no samples while it trains": ("tuning.sample_every", "adapting.sample_every"),
            "sparsify keeps the last model alone": ("tuning.model_every", "adapting.model_every"),
            "the training of routers does not use it": routers,
        }  # fmt: skip
        if self.data:
            idle["--data is given, so nothing is sampled"] = ("samples", "sampling")
        else:
            idle["the data are samples of the model (--data is empty)"] = ("images",)
        if "tune" not in self.stages:
            idle["stage tune is not run"] = ("tune", "hoyer", "tuning")
        elif self.tune == "none":
            idle["tune is none"] = ("hoyer", "tuning")
        if "split" not in self.stages:
            idle["stage split is not run"] = ("expert_size", "router_width")
        if "routers" not in self.stages:
            idle["stage routers is not run"] = ("routers",)
        if "adapt" not in self.stages:
            idle["stage adapt is not run"] = ("adapting",)
        if "thresholds" not in self.stages:
            idle["stage thresholds is not run"] = ("budgets",)
            if "adapt" not in self.stages:
                idle["neither stage thresholds nor adapt is run"] = ("budget",)
        return idle
