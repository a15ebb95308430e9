"""Settings of tokenizer training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.idle import Idle
from nextscale.config.parse import check_fields
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.training import NO_GENERATOR, TrainConfig
from nextscale.pyramid import Pyramid

_SIZES = ("channels", "layers")


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the losses. Codebook and commitment losses have weight 1 (commitment beta is a tokenizer setting)."""

    l1: float = 1.0
    """Weight of the mean absolute error of the pixels. It keeps edges sharper than l2."""
    l2: float = 1.0
    """Weight of the mean squared error of the pixels, which PSNR measures."""
    lpips: float = 0.0
    """Weight of the perceptual loss; above 0 it needs both files below."""
    lpips_vgg: str = ""
    """VGG-16 weights in torchvision's form (vgg16-397923af.pth, or the same tensors in safetensors)."""
    lpips_linear: str = ""
    """LPIPS 0.1 linear heads for VGG (vgg.pth of the LPIPS repository, or safetensors)."""
    adversarial: float = 0.0
    """Weight of a patch discriminator with hinge loss, scaled by the ratio of the gradients (VQGAN)."""
    adversarial_start: int = 1000
    """First step at which the tokenizer gets the adversarial loss. The discriminator is trained from step 0."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first layer; each layer doubles them, up to eight times."""
    discriminator_layers: int = 3
    """Layers of the discriminator that halve the resolution: more layers judge larger patches."""

    def __post_init__(self) -> None:
        weights = ("l1", "l2", "lpips", "adversarial", "adversarial_start")
        rules = {f"{name} must be 0 or more": getattr(self, name) >= 0 for name in weights}
        rules |= {f"discriminator_{n} must be 1 or more": getattr(self, f"discriminator_{n}") >= 1 for n in _SIZES}
        check_fields("losses", self, rules)
        if not (self.l1 or self.l2 or self.lpips):
            raise UserError("losses: l1, l2 and lpips are all 0: the decoder would learn nothing; give one of them")
        if self.lpips > 0 and not (self.lpips_vgg and self.lpips_linear):
            raise UserError(
                "losses: lpips needs two weight files: lpips_vgg (torchvision's vgg16-397923af.pth) and lpips_linear "
                "(vgg.pth of the LPIPS repository, version 0.1); or set lpips to 0"
            )

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if not self.lpips:
            idle["there is no perceptual loss ({at}lpips is 0)"] = ("lpips_vgg", "lpips_linear")
        if not self.adversarial:
            names = ("adversarial_start", "discriminator_channels", "discriminator_layers")
            idle["there is no discriminator ({at}adversarial is 0)"] = names
        return idle


@dataclass(frozen=True)
class CodebookConfig:
    """How codes are trained, and how dead codes are revived."""

    update: Literal["gradient", "ema"] = "gradient"
    """gradient: by the codebook loss. ema: as moving averages of the vectors assigned to them."""
    ema_decay: float = 0.99
    """Decay of the moving averages with update ema: nearer to 1, codes move more slowly."""
    revive_every: int = 50
    """Steps between revivals of dead codes; 0 = never."""
    revive_below: float = 0.05
    """A code is dead when it is used less often than this share of the average code (moving average)."""
    scale_dropout: float = 0.0
    """Share of the images that are decoded from a random number of their coarse scales alone, so that each scale leaves
    a picture that is as good as it can be (quantizer dropout, SoundStream, arXiv 2107.03312, Sec. III-C). More of it
    makes the coarse scales better and the complete images a little worse."""

    def __post_init__(self) -> None:
        rules = {
            "ema_decay must lie between 0 and 1": 0 < self.ema_decay < 1,
            "revive_every must be 0 (never) or more": self.revive_every >= 0,
            "revive_below must lie in 0 to below 1": 0 <= self.revive_below < 1,
            "scale_dropout must lie in 0 to 1": 0 <= self.scale_dropout <= 1,
        }
        check_fields("codebook", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if self.update != "ema":
            idle["{at}update is gradient"] = ("ema_decay",)
        if not self.revive_every:
            idle["dead codes are never revived ({at}revive_every is 0)"] = ("revive_below",)
        elif not self.revive_below:
            idle["no code counts as dead ({at}revive_below is 0)"] = ("revive_every",)
        return idle


@dataclass(frozen=True)
class TokenizerRunConfig:
    """A run of `nextscale tokenizer train`."""

    image_size: int = 0
    """Side of square images in pixels; 0 = that of the start checkpoint, or 32 without one. Images that are not square
    have the size that `scales` give."""
    scales: str = ""
    """Sides of the token maps, coarse to fine: 1,2,4,8, or height x width for images that are not square, 1,2,3x4,6x8.
    Empty = those of the start checkpoint at its image size; otherwise they are derived from the image size."""
    images: DataConfig = field(default_factory=DataConfig)
    start: str = ""
    """Checkpoint folder to fine-tune, such as an imported official tokenizer. Its tokenizer settings are used."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=1e-3, save_every=500))
    losses: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        check_fields("run", self, {"image_size must be 0 or more": self.image_size >= 0})
        if not self.train.epochs:
            self.check_length(self.train.steps)

    def check_length(self, steps: int) -> None:
        """Raise UserError when a part of the losses would not be used in a run of so many steps."""
        if self.losses.adversarial > 0 and self.losses.adversarial_start >= steps:
            raise UserError(
                f"losses: adversarial_start {self.losses.adversarial_start:,} is not before the end of the run, step "
                f"{steps:,}: the adversarial loss would never be used; start earlier, or set adversarial to 0"
            )

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {
            "a tokenizer's training does not use it": tuple(f"train.{n}" for n in (*NO_GENERATOR, "label_smoothing"))
        }
        if self.start:
            idle["the tokenizer is that of --start"] = ("tokenizer",)
        return idle

    def list_doubts(self) -> list[str]:
        """Settings under which dead codes are never revived."""
        every, steps = self.codebook.revive_every, self.train.steps
        never = not self.train.epochs and every > steps
        return [f"codebook.revive_every {every} is more than the {steps} steps: codes are not revived"] * never


def derive_pyramid(size: int, factor: int, scales: str, default: int = 32) -> Pyramid:
    """The pyramid for square images of `size` pixels (0 = `default`) and a tokenizer that downsamples `factor` times.

    `scales` as text, or empty for sides like the published ones up to size / factor. Scales whose last one is not
    square give the size of the images themselves; `size` is 0 then. UserError when they do not fit.
    """
    pyramid = Pyramid.parse(scales) if scales else None
    if pyramid and not size and pyramid.last[0] != pyramid.last[1]:
        return pyramid
    size = size or default
    if size < factor or size % factor:
        raise UserError(f"image_size {size} must be a multiple of {factor}, the tokenizer's reduction")
    last = size // factor
    if pyramid is None:
        sides = [s for s in (1, 2, 3, 4, 6, 8, 10, 13, 16, 24, 32) if s < last]
        return Pyramid.parse(" ".join(map(str, [*sides, last])))
    if pyramid.last != (last, last):
        raise UserError(
            f"the last of the scales {pyramid} must be {last} for images of {size} pixels and a tokenizer that "
            f"reduces {factor} times"
        )
    return pyramid
