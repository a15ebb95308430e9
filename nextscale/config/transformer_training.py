"""Settings of `nextscale train`. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.idle import Idle
from nextscale.config.initialization import InitConfig
from nextscale.config.lora import LoraConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid


@dataclass(frozen=True)
class LossConfig:
    """Losses besides the cross-entropy (MEPA, Eq. 10-13): load balance of experts, and semantic guidance."""

    balance: float = 0.01
    """Weight of the load-balance loss of a mixture of experts (that of Switch and GShard; not in the paper)."""
    idle_balance: float = 0.75
    """moe++: weight of a zero-computation expert in the load-balance loss; an FFN expert has 1."""
    balance_over: Literal["image", "batch"] = "image"
    """Tokens over which the load-balance loss evens the load. image: those of each image by itself. batch: those of all
    images that are computed at once, in all processes, so the result depends on train.micro_batch."""
    encoder: str = ""
    """Frozen encoder for semantic guidance: a folder, a name on the hub, pixels, or 'cache' for the features in a token
    cache (`nextscale tokenize --encoder`). Empty = no guidance."""
    group: str = "intermediate"
    """Scales whose features are guided: last, large, intermediate, small, or numbers from 1: 5,6,7."""
    aggregate: bool = True
    """With guidance: the features of a scale are the sum of its own and of all coarser scales (Eq. 11). Otherwise they
    are its own alone."""
    cross_entropy: float = 0.5
    """With guidance: weight lambda of the cross-entropy; the guidance loss has weight 1 (Eq. 13)."""
    shuffle: bool = False
    """With guidance by a token cache: give each image the features of another one. A control that should not help."""

    def __post_init__(self) -> None:
        rules = {
            f"{n} must be 0 or more": 0 <= getattr(self, n) < math.inf
            for n in ("balance", "idle_balance", "cross_entropy")
        }
        rules["cross_entropy must be above 0: with guidance alone the model learns no tokens"] = (
            not self.encoder or self.cross_entropy > 0
        )
        check_fields("loss", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        return (
            {}
            if self.encoder
            else {"there is no guidance ({at}encoder is empty)": ("group", "aggregate", "cross_entropy", "shuffle")}
        )


@dataclass(frozen=True)
class SizesConfig:
    """Training one model at several sizes, or on the first scales of one (docs/sizes.md)."""

    scales: tuple[str, ...] = ()
    """Other sizes to train at, each as the sides of its token maps, coarse to fine: 1,2,3,4 1,2x3,4x6. Every step has
    images of one size; positions are those of the model's own scales, resampled or rotated."""
    drop: float = 0.0
    """Share of the steps that leave out the last scales of their images: cheaper, with more weight on the first ones.
    Sample such images with --stop-at."""
    lengths: tuple[int, ...] = ()
    """With drop: how many scales such a step may keep; one is drawn for each. Empty = from 2 to all but one."""

    def __post_init__(self) -> None:
        rules = {
            "drop must lie in 0 to below 1": 0 <= self.drop < 1,
            "lengths must be different numbers of 2 to 256": all(2 <= length <= 256 for length in self.lengths)
            and len({*self.lengths}) == len(self.lengths),
        }
        check_fields("sizes", self, rules)
        pyramids = [Pyramid.parse(text) for text in self.scales]
        if len({*pyramids}) < len(pyramids) or any(len(pyramid) < 2 for pyramid in pyramids):
            raise UserError("sizes.scales must be different, of two scales each or more")

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        return {} if self.drop else {"no scale is left out ({at}drop is 0)": ("lengths",)}

    def list_pyramids(self, own: Pyramid) -> tuple[Pyramid, ...]:
        """All pyramids, that of the model and the others, the longest first. UserError where one is the model's."""
        others = [Pyramid.parse(text) for text in self.scales]
        if own in others:
            raise UserError(f"sizes.scales: {own} are the model's own scales: list the others alone")
        return tuple(sorted([own, *others], key=lambda pyramid: -pyramid.length))

    def list_lengths(self, scales: int) -> tuple[int, ...]:
        """How many of so many scales a step with left-out ones may keep."""
        return tuple(n for n in self.lengths or range(2, scales) if n < scales)


@dataclass(frozen=True)
class RunConfig:
    """A run of `nextscale train`."""

    data: str = ""
    """Images ('digits', a folder, parquet, owner/name on the hub), or a token cache that `nextscale tokenize` wrote."""
    tokenizer: str = ""
    """Checkpoint folder whose tokenizer is used."""
    start: str = ""
    """Checkpoint folder to fine-tune (such as `nextscale adapt` writes). Its transformer and tokenizer are used."""
    scales: str = ""
    """Sides of the token maps, coarse to fine; empty = the tokenizer's."""
    images: DataConfig = field(default_factory=DataConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The number of classes is taken from the data."""
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sizes: SizesConfig = field(default_factory=SizesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train in place of the model of --start; the run then holds the adapter alone."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """Settings of the sample grids."""
    validation_images: int = 2000
    """Largest number of held-out images in a validation."""

    def __post_init__(self) -> None:
        check_fields("run", self, {"validation_images must be 1 or more": self.validation_images >= 1})
        check_trainable(self.transformer)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        return list_generator_idle(self.transformer, self.loss) | (
            {"weights and scales are those of --start": ("init", "scales")} if self.start else {}
        )

    def list_doubts(self) -> list[str]:
        """Values under which a part of the model learns nothing."""
        doubts = list_generator_doubts(self.train, self.transformer, self.sampling, "train.")
        # the model of an adapter has learned to generate without a class
        return [doubt for doubt in doubts if not (self.lora.on and doubt.startswith("train.label_drop"))]

    def complete(self) -> RunConfig:
        """Itself, if it names data and a tokenizer; otherwise UserError says what is missing."""
        if not self.data:
            raise UserError("no data: give --data (images, or a token cache that `nextscale tokenize` wrote)")
        if bool(self.tokenizer) == bool(self.start):
            raise UserError("give either --tokenizer DIR (to train from scratch) or --start DIR (to fine-tune)")
        if self.lora.on and not self.start:
            raise UserError("--lora.rank trains adapters of a model: give that model with --start DIR")
        if self.lora.on and self.sizes.scales:
            raise UserError("adapters are trained at their model's own size: leave out --sizes.scales")
        if self.lora.on and self.loss.encoder:
            raise UserError(
                "adapters are trained without semantic guidance, whose head would not be theirs: leave out "
                "--loss.encoder"
            )
        return self

    def fit(self, classes: int, size: tuple[int, int], features: int) -> TransformerConfig:
        """The transformer for so many classes and images of this size, with an alignment head for features of this
        width; 0 = none."""
        condition = self.transformer.condition.fit(classes, size)
        alignment = dataclasses.replace(self.transformer.alignment, width=features)
        return dataclasses.replace(self.transformer, condition=condition, alignment=alignment)


def check_trainable(transformer: TransformerConfig) -> None:
    """Raise UserError for dynamic experts: the training of a generator does not train their routers."""
    dynamic = transformer.dynamic
    if dynamic.experts or dynamic.tau or dynamic.router_fingerprint:
        raise UserError(
            "transformer.dynamic: experts, tau and router_fingerprint are set by `nextscale sparsify`, which also "
            "trains the routers; train the dense model first, without them"
        )


def list_generator_idle(transformer: TransformerConfig, loss: LossConfig) -> Idle:
    """Settings of a generator's run that have no effect, see `nextscale.config.idle`."""
    router = transformer.experts.router
    idle: dict[str, tuple[str, ...]] = {
        "it is taken from the data": ("transformer.condition.num_classes",),
        "it is taken from the encoder": ("transformer.alignment.width",),
    }
    if not loss.encoder:
        head = ("transformer.alignment.hidden", "transformer.alignment.block")
        idle["there is no guidance (loss.encoder is empty)"] = head
    if router == "none":
        idle["there is no mixture of experts (transformer.experts.router is none)"] = (
            "loss.balance",
            "loss.balance_over",
        )
    if router in ("none", "stmoe", "smoe", "expert-choice"):
        idle["it belongs to the router moe++"] = ("loss.idle_balance",)
    if router == "smoe":
        idle["the router smoe selects the same experts for all images"] = ("loss.balance_over",)
    return idle


def list_generator_doubts(
    train: TrainConfig, transformer: TransformerConfig, sampling: SampleConfig, at: str
) -> list[str]:
    """Settings under which a part of a generator learns or does nothing. `at`: place of `train` among the options."""
    doubts = {
        f"{at}label_drop is 0: the model does not learn to generate without a class, which guidance needs; set "
        "sampling.cfg to 0, too, and sample with --cfg 0": train.label_drop == 0 and sampling.guided,
        f"{at}drop_path has no effect: the transformer has one block, and the first is never dropped": train.drop_path
        > 0
        and transformer.depth == 1,
    }
    return [doubt for doubt, applies in doubts.items() if applies]
