"""Settings of classifier training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config.data import DataConfig
from nextscale.config.idle import Idle
from nextscale.config.parse import check_fields
from nextscale.config.training import NO_GENERATOR, TrainConfig


@dataclass(frozen=True)
class ClassifierConfig:
    """A residual CNN. With group norm, features of an image do not depend on its batch."""

    image_size: int = 32
    """Side of the square images in pixels. Other images are resized to it."""
    widths: tuple[int, ...] = (64, 128, 192)
    """Channels of the stages. Each stage halves the resolution."""
    groups: int = 16
    """Groups of every norm; must divide all widths."""
    mirror: bool = True
    """Average features and logits over an image and its horizontal flip. Training uses single images."""

    def __post_init__(self) -> None:
        rules = {
            "widths must be 1 to 8 numbers that groups divides, up to 65536": 1 <= len(self.widths) <= 8
            and self.groups >= 1
            and all(1 <= w <= 2**16 and w % self.groups == 0 for w in self.widths),
            "image_size must be 8 to 65536 and a multiple of 2 for each of the widths": 8 <= self.image_size <= 2**16
            and self.image_size % 2 ** len(self.widths) == 0,
        }
        check_fields("classifier", self, rules)


@dataclass(frozen=True)
class ClassifierRunConfig:
    """A run of `nextscale classifier train`."""

    images: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-3, save_every=500))
    """label_drop and drop_path have no effect."""
    shift: int = 4
    """Each training image is shifted by up to this many pixels, with its border reflected."""

    def __post_init__(self) -> None:
        limit = self.classifier.image_size // 2
        check_fields("run", self, {f"shift must be 0 to {limit}": 0 <= self.shift <= limit})

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        return {"a classifier's training does not use it": tuple(f"train.{name}" for name in NO_GENERATOR)}
