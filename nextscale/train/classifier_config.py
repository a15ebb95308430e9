"""Settings of classifier training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config import DataConfig
from nextscale.config_dict import check
from nextscale.features.classifier_config import ClassifierConfig
from nextscale.train.config import TrainConfig


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
        check("run", self, {f"shift must be 0 to {limit}": 0 <= self.shift <= limit})
