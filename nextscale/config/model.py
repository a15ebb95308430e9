"""Settings of a whole model, which a checkpoint's `config.json` holds. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nextscale.common.errors import UserError
from nextscale.config.parse import suggest_name
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import PYRAMID_256, Pyramid


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: a tokenizer and a transformer, or only a tokenizer when `transformer` is None."""

    pyramid: Pyramid = PYRAMID_256
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    transformer: TransformerConfig | None = field(default_factory=TransformerConfig)
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty when unknown."""

    def __post_init__(self) -> None:
        classes = self.transformer.condition.num_classes if self.transformer else len(self.class_names)
        if self.class_names and len(self.class_names) != classes:
            raise UserError(f"config has {len(self.class_names)} class names for {classes} classes")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        h, w = self.pyramid.last
        return h * self.tokenizer.downsampling, w * self.tokenizer.downsampling

    def find_class(self, label: str) -> int:
        """The index of a class name, or of an index as text; UserError when there is no such class name."""
        if label in self.class_names:
            return self.class_names.index(label)
        if re.fullmatch(r"-?[0-9]{1,18}", label):
            return int(label)
        names = list(self.class_names)
        hint = suggest_name(label, names) if names else "; this checkpoint has no class names, use numbers"
        raise UserError(f"there is no class named '{label}'{hint}")

    def summarize(self) -> str:
        """One line of text: classes, scales, image size."""
        height, width = self.image_size
        what = f"{self.transformer.condition.num_classes} classes" if self.transformer else "a tokenizer alone"
        return f"{what}, scales {self.pyramid}, images of {height} x {width} pixels"
