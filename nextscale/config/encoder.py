"""Settings of encoder training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config.data import DataConfig
from nextscale.config.idle import Idle
from nextscale.config.parse import check_fields
from nextscale.config.training import NO_GENERATOR, TrainConfig


@dataclass(frozen=True)
class EncoderConfig:
    """A residual CNN. With group norm, features of an image do not depend on its batch."""

    image_size: int = 32
    """Side of the square training images in pixels."""
    widths: tuple[int, ...] = (64, 128)
    """Channels of the stages. Each stage halves the resolution; the last one's channels are the features."""
    blocks: tuple[int, ...] = (1, 2)
    """Residual convolutions of each stage."""
    groups: int = 16
    """Groups of every norm; must divide all widths."""

    def __post_init__(self) -> None:
        rules = {
            "widths must be 1 to 8 numbers that groups divides, up to 65536": 1 <= len(self.widths) <= 8
            and self.groups >= 1
            and all(1 <= w <= 2**16 and w % self.groups == 0 for w in self.widths),
            "blocks must be one number of 0 to 100 for each of the widths": len(self.blocks) == len(self.widths)
            and 0 <= min(self.blocks) <= max(self.blocks) <= 100,
            "image_size must be 8 to 65536 and a multiple of 2 for each of the widths": 8 <= self.image_size <= 2**16
            and self.image_size % self.patch == 0,
        }
        check_fields("encoder", self, rules)

    @property
    def patch(self) -> int:
        """Pixels per cell of the last feature map, along each side."""
        return int(2 ** len(self.widths))


@dataclass(frozen=True)
class ViewConfig:
    """Augmentation of an image into two views that should have similar features. Defaults: MoCo v2's, without blur."""

    smallest_crop: float = 0.2
    """Smallest area of a random crop, as a share of the image. Crops have aspect 3:4 to 4:3 and are resized."""
    flip: bool = True
    """Flip half of the views horizontally."""
    jitter: float = 0.4
    """Brightness, contrast and saturation are each multiplied by a factor of 1 - jitter to 1 + jitter."""
    hue: float = 0.1
    """Hue is shifted by up to this share of the colour circle, in both directions."""
    jitter_share: float = 0.8
    """Share of views whose colours are jittered."""
    grey_share: float = 0.2
    """Share of views that are converted to grey."""

    def __post_init__(self) -> None:
        rules = {
            "smallest_crop must lie between 0 and 1": 0 < self.smallest_crop <= 1,
            "jitter must lie in 0 to 1": 0 <= self.jitter <= 1,
            "hue must lie in 0 to 0.5": 0 <= self.hue <= 0.5,
            "jitter_share must lie in 0 to 1": 0 <= self.jitter_share <= 1,
            "grey_share must lie in 0 to 1": 0 <= self.grey_share <= 1,
        }
        check_fields("views", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        if not self.jitter_share:
            return {"no view's colours are jittered ({at}jitter_share is 0)": ("jitter", "hue")}
        if not self.jitter and not self.hue:
            return {"{at}jitter and {at}hue are 0": ("jitter_share",)}
        return {}

    def list_doubts(self) -> list[str]:
        """Values under which both views of an image are equal."""
        jitters = self.jitter_share and (self.jitter or self.hue)
        if self.flip or self.grey_share or jitters or self.smallest_crop < 1:
            return []
        return ["no augmentation of the views is left: both views of an image are equal and teach nothing"]


@dataclass(frozen=True)
class MocoConfig:
    """MoCo v2 (Chen et al. 2020, arXiv 2003.04297). The defaults suit small images and short runs. Published: a queue
    of 65,536 keys, momentum 0.999 and a hidden width of 2,048."""

    queue: int = 4096
    """Keys of earlier images, the negatives."""
    momentum: float = 0.99
    """Momentum of the key encoder, a moving average of the trained one."""
    temperature: float = 0.2
    """Divides the similarities in the contrastive loss: a lower one makes it depend on the hardest negatives."""
    hidden: int = 256
    """Hidden width of the projection head, which is used in training only."""
    key_width: int = 128
    """Width of the keys and queries that are compared, the head's output."""

    def __post_init__(self) -> None:
        rules = {f"{n} must be 1 or more": getattr(self, n) >= 1 for n in ("queue", "hidden", "key_width")}
        rules |= {
            "momentum must lie in 0 to below 1": 0 <= self.momentum < 1,
            "temperature must be above 0": self.temperature > 0,
        }
        check_fields("moco", self, rules)


@dataclass(frozen=True)
class EncoderRunConfig:
    """A run of `nextscale encoder train`."""

    images: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-3, save_every=500))
    """label_drop, label_smoothing and drop_path have no effect."""
    bank: int = 5000
    """Training images whose features give mean and standard deviation, and are the bank of the k-NN validation."""

    def __post_init__(self) -> None:
        rules = {"bank must be 1 or more": self.bank >= 1}
        check_fields("run", self, rules)
        batch = self.train.batch_size
        check_fields("moco", self.moco, {f"queue must hold a batch ({batch}) at least": self.moco.queue >= batch})

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        names = (*NO_GENERATOR, "label_smoothing")
        return {"an encoder's training does not use it": tuple(f"train.{name}" for name in names)}
