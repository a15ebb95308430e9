"""Settings of low-rank adapters (LoRA, arXiv 2106.09685). Needs no torch."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.idle import Idle
from nextscale.config.parse import check_fields

LayerGroup = Literal["mixers", "ffn"]
NEW_ROWS = "condition.embedding.new_rows"
"""The name of the embeddings of new classes, among parameters and in files."""


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters and the embeddings of new classes in place of the model: W + alpha / rank * B A."""

    rank: int = 0
    """Rank of the adapters: 4 to 16 for some ten or hundred images. 0 = none: the whole model is trained."""
    alpha: float = 0.0
    """The adapters' product is scaled by alpha / rank; 0 = rank, a scale of 1."""
    layers: tuple[LayerGroup, ...] = ("mixers", "ffn")
    """Which linear layers get adapters. mixers: attention's projections and, of an M-VAR, Mamba's. ffn: those of the
    feed-forward or of all its experts."""
    classes_only: bool = False
    """No adapters: train the embeddings of new classes alone. All other classes stay as they are, bit for bit."""
    classes: str = ""
    """New classes whose embedding starts from that of a class of the model: NEW=OLD, separated by commas, such as
    my-cat=cat. Others start from the mean of all classes."""

    keep: int = 512
    """Samples of the model that the adapters are trained on, too, half of each batch, so that the other classes stay as
    they are (prior preservation, DreamBooth). More keep them better; 0 = none."""

    def __post_init__(self) -> None:
        rules = {
            "rank must be 0 or more": self.rank >= 0,
            "keep must be 0 or more": self.keep >= 0,
            "alpha must be 0 (= rank) or more": 0 <= self.alpha < math.inf,
            "layers must name mixers, ffn or both, each once": 0 < len(self.layers) == len({*self.layers}),
            "classes_only goes with rank 0: it trains no adapters": not (self.classes_only and self.rank),
        }
        check_fields("lora", self, rules)

    @property
    def on(self) -> bool:
        """Whether adapters or embeddings are trained in place of the model."""
        return self.rank > 0 or self.classes_only

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if not self.rank:
            idle["there are no adapters ({at}rank is 0)"] = ("alpha", "layers", "keep")
        if not self.on:
            idle["the whole model is trained ({at}rank is 0)"] = ("classes",)
        return idle


def parse_source(text: str, weight: float = 1.0) -> tuple[str, float]:
    """An adapter's folder and its weight, from FOLDER:WEIGHT, or from FOLDER with `weight`; UserError for a weight that
    is not finite."""
    folder, colon, number = text.rpartition(":")
    with suppress(ValueError):  # a colon in the folder's name
        text, weight = (folder, float(number)) if colon and folder else (text, weight)
    if not math.isfinite(weight):
        raise UserError(f"the weight of an adapter must be a finite number; got {weight} for {text}")
    return text, weight
