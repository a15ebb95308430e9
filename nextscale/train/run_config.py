"""Settings of `nextscale train`: a whole run of a generator. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from nextscale.config import DataConfig, InitConfig, SampleConfig, TransformerConfig, check
from nextscale.errors import UserError
from nextscale.train.config import TrainConfig


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
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """For the sample grids."""
    validation_images: int = 2000
    """Held-out images that every evaluation uses, at most."""

    def __post_init__(self) -> None:
        check("run", self, {"validation_images must be 1 or more": self.validation_images >= 1})

    def complete(self) -> RunConfig:
        """Itself, when it names data and a tokenizer; UserError says what is missing."""
        if not self.data:
            raise UserError("no data: give --data (images, or a token cache that `nextscale tokenize` wrote)")
        if bool(self.tokenizer) == bool(self.start):
            raise UserError("give either --tokenizer DIR (to train from scratch) or --start DIR (to fine-tune)")
        return self

    def with_classes(self, count: int) -> TransformerConfig:
        """The transformer for this many classes."""
        condition = dataclasses.replace(self.transformer.condition, num_classes=count)
        return dataclasses.replace(self.transformer, condition=condition)
