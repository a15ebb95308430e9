"""Settings of a whole model, which a checkpoint's `config.json` holds. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.labels import index_labels, list_labels
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import PYRAMID_256, Pyramid


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: a tokenizer and a transformer, or only a tokenizer when `transformer` is None."""

    pyramid: Pyramid = PYRAMID_256
    """The scales: the sides of their token maps, coarse to fine; height x width where they are not square."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    transformer: TransformerConfig | None = field(default_factory=TransformerConfig)
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty when unknown."""
    sizes: tuple[Pyramid, ...] = ()
    """Other pyramids that the transformer was trained at; its tables of positions are those of `pyramid`."""

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        if self.transformer:
            condition = self.transformer.condition
            classes = condition.count_of_classes or (condition.num_classes if condition.takes_labels else 0)
        if self.class_names and len(self.class_names) != classes:
            raise UserError(f"config has {len(self.class_names)} class names for {classes} classes")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        h, w = self.pyramid.last
        return h * self.tokenizer.downsampling, w * self.tokenizer.downsampling

    @property
    def count_of_classes(self) -> int | None:
        """Number of classes; None where images are not conditioned on classes."""
        condition = self.transformer.condition if self.transformer else None
        return condition.count_of_classes if condition else None

    def caption(self, value: int | None) -> str:
        """The caption of an image of this class, None for no label; empty where images have no classes."""
        count = self.count_of_classes
        if count is None:
            return ""
        if value is None or value >= count:
            return "no label"
        return self.class_names[value] if self.class_names else str(int(value))

    def find_class(self, label: str) -> int | None:
        """The class that a user wrote, None for no label: see `nextscale.config.classes`."""
        from nextscale.config.classes import find_class

        return find_class(label, self.class_names, self.count_of_classes)

    def parse_classes(self, text: str, option: str = "labels") -> list[int | None]:
        """The classes of a list that a user wrote, such as `cat,3,none`. `option`: what messages call the list."""
        from nextscale.config.classes import parse_classes

        return parse_classes(text, self.class_names, self.count_of_classes, option)

    def index_labels(self, labels: Any) -> list[int | None]:
        """Labels of a Python caller as class numbers, None for no label: see `nextscale.config.labels.index_labels`.

        Values of a condition of your own that are no text stay as they are.
        """
        if self.count_of_classes is not None or isinstance(labels, str):
            return index_labels(labels, self.class_names, self.count_of_classes)
        return [self.find_class(value) if isinstance(value, str) else value for value in list_labels(labels)]

    def estimate_parameters(self) -> int:
        """A lower bound of the number of parameters, without building the model."""
        codes, model = self.tokenizer, self.transformer
        widest = codes.base_channels * max(codes.channel_multipliers)
        count = codes.vocab_size * codes.code_width + 2 * codes.base_channels * widest
        if model is not None:
            experts = model.experts.count if model.experts.router != "none" else 1
            count += model.depth * model.width * model.width * 4
            count += 2 * model.depth * experts * model.width * model.ffn_width
            count += (codes.vocab_size + model.condition.num_classes) * model.width
        return count

    def check_memory(self) -> None:
        """Raise UserError when float32 weights need more memory than this machine has; unknown memory is enough."""
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return
        count = self.estimate_parameters()
        if 4 * count > total > 0:
            raise UserError(
                f"a model of {count:,} parameters or more would need {4 * count / 2**30:,.0f} GiB, and this machine "
                f"has {total / 2**30:,.0f}"
            )

    def summarize(self) -> str:
        """One line of text: classes, scales, image size."""
        height, width = self.image_size
        what = self.transformer.condition.describe() if self.transformer else "a tokenizer alone"
        others = f", and at scales {' and '.join(map(str, self.sizes))}" if self.sizes else ""
        return f"{what}, scales {self.pyramid}, images of {height} x {width} pixels{others}"
