"""What the quickstart's images are generated from: the classes of the data, or its captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.model import ModelConfig
from nextscale.data.captions import CaptionBytes, CaptionedExamples, TextInput
from nextscale.data.classes import Classes, ClassMatch, match_classes
from nextscale.data.datasets import ImageSet
from nextscale.data.examples import MemoryExamples
from nextscale.pipeline import Pipeline

_SHOWN = 10


class Asked(Protocol):
    """What images are asked for with, and what examples have of it. Keywords are those of `Pipeline.sample`."""

    def show(self, each: int) -> dict[str, Any]:
        """Keywords for the first ten classes or captions, `each` images of each."""

    def measure(self, count: int) -> tuple[dict[str, Any], Tensor]:
        """Keywords for so many images, of all classes or held-out captions in turn, and their labels in the data."""

    def read(self, images: ImageSet, pipeline: Pipeline) -> Any:
        """Values of the model's condition for these images; of several captions the first."""

    def list_examples(self) -> dict[str, list[str]]:
        """Two of them for the report, under the name of the metric."""


@dataclass(frozen=True)
class AskedClasses:
    """The classes of the data, as those of the model."""

    match: ClassMatch
    names: tuple[str, ...]
    """Of the classes of the data, as `nextscale sample` takes them."""

    @staticmethod
    def create(where: str, data: ImageSet, model: str, config: ModelConfig) -> AskedClasses:
        """`where`: the data set. `model`: the folder of the model."""
        match = match_classes(Classes.of_data(where, data.class_names), Classes.of_model(model, config), subset=True)
        return AskedClasses(match, tuple(config.caption(label) for label in match.index))

    def show(self, each: int) -> dict[str, Any]:
        return {"labels": [label for label in self.match.index[:_SHOWN] for _ in range(each)]}

    def measure(self, count: int) -> tuple[dict[str, Any], Tensor]:
        labels_B = torch.arange(count) % len(self.match.index)
        return {"labels": torch.tensor(self.match.index)[labels_B]}, labels_B

    def read(self, images: ImageSet, pipeline: Pipeline) -> Any:
        return torch.tensor(self.match.index, device=pipeline.device)[images.labels_B.to(pipeline.device)]

    def list_examples(self) -> dict[str, list[str]]:
        return {"labels": list(self.names[:2])}


@dataclass(frozen=True)
class AskedCaptions:
    """The first captions of the held-out images."""

    prompts: tuple[str, ...]
    """Those that are not empty."""
    labels_B: Tensor = field(repr=False)
    """The classes of their images."""

    @staticmethod
    def create(where: str, held_out: ImageSet) -> AskedCaptions:
        """UserError when no held-out image has a caption."""
        texts = list_first_captions(held_out)
        rows = [i for i, text in enumerate(texts) if text]
        if not rows:
            raise UserError(f"no held-out image of {where} has a caption: give captions to more images, or more images")
        return AskedCaptions(tuple(texts[i] for i in rows), held_out.labels_B[rows])

    def show(self, each: int) -> dict[str, Any]:
        different = [*dict.fromkeys(self.prompts)][:_SHOWN]
        return {"prompts": [text for text in different for _ in range(each)]}

    def measure(self, count: int) -> tuple[dict[str, Any], Tensor]:
        rows = [i % len(self.prompts) for i in range(count)]
        return {"prompts": [self.prompts[i] for i in rows]}, self.labels_B[rows]

    def read(self, images: ImageSet, pipeline: Pipeline) -> Any:
        return pipeline.transformer.condition.parse(list_first_captions(images))

    def list_examples(self) -> dict[str, list[str]]:
        return {"prompts": [*dict.fromkeys(self.prompts)][:2]}


def list_first_captions(images: ImageSet) -> list[str]:
    """The first caption of each image of a set with captions."""
    captions = images.captions
    assert captions is not None, "the set was read with its captions"
    return [captions[i][0] for i in range(len(captions))]


def create_examples(
    condition: ConditionConfig, images: ImageSet, tensors: dict[str, Tensor], seed: int
) -> MemoryExamples:
    """Examples of a training: `tensors`, and what the condition reads of the images."""
    text = TextInput.of_condition(condition)
    if text is None:
        return MemoryExamples(label=images.labels_B, **tensors)
    assert images.captions is not None, "the set was read with its captions"
    texts = CaptionBytes(images.captions, text.max_tokens, seed)
    return CaptionedExamples(texts, label=images.labels_B, **tensors)
