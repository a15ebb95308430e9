"""Settings of `nextscale train`: a whole run of a generator. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import InitConfig, TransformerConfig


@dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross-entropy (MEPA, Eq. 10-13): even use of experts, semantic guidance."""

    balance: float = 0.01
    """Weight of the load-balance loss of every mixture of experts (not in the paper; Switch's and GShard's)."""
    idle_balance: float = 0.75
    """moe++: what an idle expert counts in the load-balance loss, against 1 of an FFN expert."""
    encoder: str = ""
    """Semantic guidance by this frozen encoder: its folder or name on the hub, or 'cache' for the features that a token
    cache holds (`nextscale tokenize --encoder`). Empty = none."""
    group: str = "intermediate"
    """Scales whose aggregated features are guided: last, large, intermediate, small, or numbers from 1 on: 5,6,7."""
    cross_entropy: float = 0.5
    """With guidance: weight lambda of the cross-entropy beside the guidance's 1 (Eq. 13)."""

    def __post_init__(self) -> None:
        rules = {
            f"{n} must be 0 or more": 0 <= getattr(self, n) < math.inf
            for n in ("balance", "idle_balance", "cross_entropy")
        }
        check_fields("loss", self, rules)


@dataclass(frozen=True)
class RunConfig:
    """A whole run of `nextscale train`."""

    data: str = ""
    """Images ('digits', a folder, parquet, owner/name on the hub), or a token cache that `nextscale tokenize` wrote."""
    tokenizer: str = ""
    """Checkpoint folder whose tokenizer is used."""
    start: str = ""
    """Checkpoint folder to fine-tune (`nextscale adapt` writes one); its transformer and tokenizer then hold."""
    scales: str = ""
    """Sides of the token maps, coarse to fine; empty = the tokenizer's own."""
    images: DataConfig = field(default_factory=DataConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The number of classes is taken from the data."""
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """For the sample grids."""
    validation_images: int = 2000
    """Held-out images that every evaluation uses, at most."""

    def __post_init__(self) -> None:
        check_fields("run", self, {"validation_images must be 1 or more": self.validation_images >= 1})

    def complete(self) -> RunConfig:
        """Itself, when it names data and a tokenizer; UserError says what is missing."""
        if not self.data:
            raise UserError("no data: give --data (images, or a token cache that `nextscale tokenize` wrote)")
        if bool(self.tokenizer) == bool(self.start):
            raise UserError("give either --tokenizer DIR (to train from scratch) or --start DIR (to fine-tune)")
        return self

    def with_classes(self, count: int, features: int) -> TransformerConfig:
        """The transformer for this many classes, with an alignment head for features of this width; 0 = none."""
        condition = dataclasses.replace(self.transformer.condition, num_classes=count)
        alignment = dataclasses.replace(self.transformer.alignment, width=features)
        return dataclasses.replace(self.transformer, condition=condition, alignment=alignment)
