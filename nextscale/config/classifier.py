"""Settings of classifier training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config.data import DataConfig
from nextscale.config.parse import check_fields
from nextscale.config.training import TrainConfig


@dataclass(frozen=True)
class ClassifierConfig:
    """A residual CNN with group norm, so that an image's features do not depend on its batch."""

    image_size: int = 32
    """Side of the square images; others are resized to it."""
    widths: tuple[int, ...] = (64, 128, 192)
    """Channels of the stages; each halves the resolution."""
    groups: int = 16
    """Groups of every norm; must divide all widths."""
    mirror: bool = True
    """Features and scores are means over an image and its mirror image; trained on single images all the same."""

    def __post_init__(self) -> None:
        rules = {
            "widths must be 1 to 8 numbers that groups divides": 1 <= len(self.widths) <= 8
            and self.groups >= 1
            and all(w >= 1 and w % self.groups == 0 for w in self.widths),
            "image_size must be a multiple of 2 for each of the widths": self.image_size >= 8
            and self.image_size % 2 ** len(self.widths) == 0,
        }
        check_fields("classifier", self, rules)


@dataclass(frozen=True)
class ClassifierRunConfig:
    """A whole run of `nextscale classifier train`."""

    images: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-3, save_every=500))
    """Its label_smoothing is used; label_drop and drop_path have no meaning here."""
    shift: int = 4
    """Each training image is moved by up to this many pixels, its border mirrored."""

    def __post_init__(self) -> None:
        limit = self.classifier.image_size // 2
        check_fields("run", self, {f"shift must be 0 to {limit}": 0 <= self.shift <= limit})
