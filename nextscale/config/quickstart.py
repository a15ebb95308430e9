"""Settings of the quickstart. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.data import ReadConfig
from nextscale.config.encoder import EncoderConfig, MocoConfig, ViewConfig
from nextscale.config.idle import Idle
from nextscale.config.parse import SEED_RULE, check_fields, is_seed
from nextscale.config.sampling import SampleConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.tokenizer_training import derive_pyramid
from nextscale.config.training import NO_GENERATOR, TrainConfig
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig, TransformerConfig
from nextscale.config.transformer_training import (
    LossConfig,
    check_trainable,
    list_generator_doubts,
    list_generator_idle,
)
from nextscale.pyramid import Pyramid


def _tokenizer() -> TokenizerConfig:
    return TokenizerConfig(
        vocab_size=128,
        code_width=8,
        base_channels=32,
        channel_multipliers=(1, 1, 2),
        res_blocks=1,
        attention=False,
    )


def _transformer() -> TransformerConfig:
    experts = ExpertsConfig(router="stmoe", count=8, active=3)
    head = AlignmentConfig(hidden=256)
    return TransformerConfig(depth=4, width=192, heads=6, ffn_ratio=2, experts=experts, alignment=head)


_SMALLEST_BATCH = 8


def _bound(train: TrainConfig, images: int, max_epochs: float) -> TrainConfig:
    """A training that passes over the images at most `max_epochs` times."""
    steps, warmup = train.schedule_steps(images)
    budget = max_epochs * images
    if steps * train.batch_size <= budget:
        return train
    batch = min(train.batch_size, max(_SMALLEST_BATCH, int(budget / steps)))
    bounded = max(1, min(steps, int(budget / batch)))
    warmup = round(warmup * bounded / steps)
    return replace(train, steps=bounded, epochs=0.0, batch_size=batch, warmup_steps=warmup, warmup_epochs=0.0)


@dataclass(frozen=True)
class QuickstartConfig:
    """Train a small tokenizer, a self-supervised encoder and a small class-conditional MEPA, then sample and measure.

    MEPA is a mixture of experts (STMoE) with semantic guidance by the encoder's features. For a dense VAR, set
    transformer.experts.router to none and loss.encoder to "". The defaults suit the bundled digits and two CPU cores.
    """

    data: str = "digits"
    """'digits' (scikit-learn's, no download), a folder of images or of class sub-folders, or a .parquet file with
    columns image and label."""
    image_size: int = 0
    """Side of square images in pixels; 0 = 16 for the digits and 32 for others. Images that are not square have the
    size that `scales` give."""
    scales: str = ""
    """Sides of the token maps, coarse to fine, such as 1,2,3,4, or height x width for images that are not square, such
    as 1,2,3x4,6x8; empty derives them from the image size."""
    images: ReadConfig = field(default_factory=ReadConfig)
    captions: bool = False
    """Generate images from captions in place of classes (docs/data.md). A text encoder is trained with the transformer;
    transformer.condition.max_tokens limits their length."""
    start: str = ""
    """Trained model to start from: an adapter of it is trained (docs/adapters.md). Empty: with fewer than `few_images`
    images models/var-cifar10, where its size fits; else a new model is trained."""
    few_images: int = 300
    """Number of images below which a trained model is looked for; 0 = never."""
    limit: int = 20000
    """Largest number of images to use, drawn at random."""
    held_out: float = 0.2
    """Share of the images that is held out for validation."""
    max_epochs: float = 30.0
    """Largest number of passes over the training images in each of the three trainings, so that a small set is not
    learned by heart: beyond it, batches are smaller and steps fewer. 0 = no bound; the digits do not reach it."""
    seed: int = 0
    """Seed of all random choices: which images are held out, initial weights, batches, samples. Change it to see how
    much a result varies."""
    tokenizer: TokenizerConfig = field(default_factory=_tokenizer)
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(widths=(32, 64), blocks=(1, 1), groups=8))
    """Its features guide the transformer. image_size is set to that of the data."""
    moco: MocoConfig = field(default_factory=lambda: MocoConfig(queue=1024, hidden=128, key_width=64))
    views: ViewConfig = field(default_factory=lambda: ViewConfig(smallest_crop=0.4, flip=False, hue=0.0))
    transformer: TransformerConfig = field(default_factory=_transformer)
    """The number of classes is taken from the data."""
    loss: LossConfig = field(default_factory=lambda: LossConfig(encoder="own"))
    """encoder: 'own' for the encoder of this run, or empty for no guidance."""
    train_tokenizer: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=800, batch_size=32, learning_rate=2e-3, save_every=100)
    )
    train_encoder: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=150, batch_size=128, learning_rate=2e-3, save_every=50)
    )
    train_transformer: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=220, learning_rate=2e-3, weight_decay=0.1, drop_path=0.2, save_every=100
        )
    )
    sampling: SampleConfig = field(default_factory=lambda: SampleConfig(cfg=1.0, top_k=0, top_p=0.95))
    measure_images: int = 2000
    """Generated images that the second classifier is fitted on; the first one reads up to 500 of them."""

    def __post_init__(self) -> None:
        rules = {
            "held_out must lie between 0 and 1": 0 < self.held_out < 1,
            "image_size must be 0 (derived from the data) or more": self.image_size >= 0,
            "limit must be at least 1": self.limit >= 1,
            "few_images must be 0 or more": self.few_images >= 0,
            "measure_images must be at least 1": self.measure_images >= 1,
            SEED_RULE: is_seed(self.seed),
        }
        check_fields("quickstart", self, rules)
        if self.loss.encoder not in ("own", ""):
            raise UserError(f"quickstart: loss.encoder is '{self.loss.encoder}'; give own, or nothing for no guidance")
        if self.captions and self.start:
            raise UserError(
                "quickstart: captions trains a new model, and start an adapter of one: give one of them. An adapter of "
                f"a model with captions is trained by `nextscale train lora --start {self.start} --lora.keep 0`"
            )
        if self.transformer.condition.kind not in (("class", "text") if self.captions else ("class",)):
            raise UserError(
                f"quickstart: transformer.condition.kind is {self.transformer.condition.kind}: the quickstart trains "
                "on classes, or with --captions on texts; other conditions are for `nextscale train`"
            )
        if not 0 <= self.max_epochs < math.inf:
            raise UserError(f"quickstart: max_epochs must be 0 (no bound) or more; got {self.max_epochs}")
        check_trainable(self.transformer)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        unused = (*NO_GENERATOR, "label_smoothing")
        idle = dict(list_generator_idle(self.transformer, self.loss))
        if not self.loss.encoder:
            idle["there is no guidance (loss.encoder is empty)"] += ("encoder", "moco", "views", "train_encoder")
        idle["the quickstart's trainings do not use it"] = (
            *(f"train_tokenizer.{name}" for name in unused),
            *(f"train_encoder.{name}" for name in unused),
            "train_transformer.sample_every",
            "train_transformer.model_every",
        )
        idle["it is that of the data"] = ("encoder.image_size",)
        return idle

    def list_doubts(self) -> list[str]:
        """Values under which a part of the model learns nothing."""
        return list_generator_doubts(self.train_transformer, self.transformer, self.sampling, "train_transformer.")

    @property
    def has_default_models(self) -> bool:
        """Whether no settings ask for other models than the default ones."""
        own = self.tokenizer, self.transformer, self.loss, self.encoder
        return own == (_tokenizer(), _transformer(), LossConfig(encoder="own"), QuickstartConfig().encoder)

    def fit_to_data(self, images: int) -> QuickstartConfig:
        """These settings for so many training images: where a training would pass over them more than `max_epochs`
        times, in smaller batches, and below a batch of 8 with fewer steps."""
        if not self.max_epochs:
            return self
        return replace(
            self,
            train_tokenizer=_bound(self.train_tokenizer, images, self.max_epochs),
            train_encoder=_bound(self.train_encoder, images, self.max_epochs),
            train_transformer=_bound(self.train_transformer, images, self.max_epochs),
        )

    def choose_transformer(self, classes: int) -> TransformerConfig:
        """The transformer to train, for data with so many classes."""
        width = self.encoder.widths[-1] if self.loss.encoder else 0
        given, head = self.transformer, replace(self.transformer.alignment, width=width)
        if not self.captions:
            return replace(given, condition=ConditionConfig(num_classes=classes), alignment=head)
        reads = () if "cross-attention" in given.mixers else ("cross-attention",)
        condition = given.condition if given.condition.kind == "text" else ConditionConfig(
            kind="text", max_tokens=given.condition.max_tokens, layers=given.condition.layers
        )  # fmt: skip
        return replace(given, mixers=(*given.mixers, *reads), condition=condition, alignment=head)

    def geometry(self) -> tuple[tuple[int, int], Pyramid]:
        """(height, width) of the images in pixels, and the pyramid."""
        factor, default = self.tokenizer.downsampling, 16 if self.data == "digits" else 32
        pyramid = derive_pyramid(self.image_size, factor, self.scales, default)
        height, width = pyramid.last
        return (height * factor, width * factor), pyramid
