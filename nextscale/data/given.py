"""What the images of a data set give to a model that draws from more than a class: captions, edges, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.data import ReadConfig
from nextscale.config.model import ModelConfig
from nextscale.data.captions import list_caption_parts
from nextscale.data.classes import Classes, match_classes
from nextscale.data.datasets import decode_image
from nextscale.data.inputs import describe_data
from nextscale.data.sources import Source, open_optional, open_source
from nextscale.transformer.conditions.picture import compute_control

_VALUES = {"text": "texts", "vector": "vectors", "picture": "control pictures", "class": "labels"}


class ImageConditions:
    """What a model's condition reads of the images of a data set, as keywords of `Pipeline.sample`.

    Of several captions an image's first one is read. Images without a caption are passed over where a part of the
    condition reads captions. Labels are those of the model, matched by name.
    """

    def __init__(self, data: str, where: str, model: ModelConfig, reading: ReadConfig | None = None):
        """`where`: what messages call the model. UserError when images of a data set do not give what it reads, and
        where this set has no captions or other classes."""
        assert model.transformer is not None, "a tokenizer alone has no condition"
        condition = model.transformer.condition
        _check_parts(condition, where)
        self.parts, self.source = condition.list_parts(), open_given(data, model, reading)
        captions = self.source.captions
        self.rows = [i for i in range(len(self.source.labels)) if captions is None or captions[i][0]]
        self.labels_N: Tensor | None = None
        """int64, the model's class of each image that is not passed over; None where it takes no labels."""
        if condition.takes_labels:
            names = Classes.of_data(data, self.source.class_names)
            match = match_classes(names, Classes.of_model(where, model), subset=True)
            match.print_note()
            self.labels_N = match.map_labels(torch.tensor(self.source.labels)[self.rows])

    def __len__(self) -> int:
        """Number of images that are not passed over."""
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The keywords for the images of these numbers, which start again after the last one."""
        chosen = [number % len(self) for number in numbers]
        given: dict[str, Any] = {}
        for name, part in self.parts.items():
            keyword, values = self._read_part(part, chosen)
            given.setdefault(keyword, {})[name] = values
        return given

    def _read_part(self, part: ConditionConfig, numbers: list[int]) -> tuple[str, list[Any]]:
        if part.kind == "text":
            captions = self.source.captions
            assert captions is not None, "the set was opened with its captions"
            return "prompts", [captions[self.rows[i]][0] for i in numbers]
        if part.kind == "picture":
            return "control", [self._compute_control(part, self.rows[i]) for i in numbers]
        assert self.labels_N is not None, "the condition takes labels"
        return "labels", self.labels_N[numbers].tolist()

    def _compute_control(self, part: ConditionConfig, row: int) -> Tensor:
        """The control picture of an image that is resized and cropped as for training, float32 (C, H, W) in 0 to 1."""
        height, width = part.picture_size
        image_HW3, _ = decode_image(self.source, row, (height, width))
        return compute_control(torch.from_numpy(image_HW3).permute(2, 0, 1)[None], part.control)[0].float() / 255

    def identity(self) -> dict[str, Any]:
        """The data set that they are of, and what it is made of, as JSON values."""
        return describe_data(self.source)


def open_given(data: str, model: ModelConfig, reading: ReadConfig | None = None) -> Source:
    """The images of a data set, with captions where the model reads them; labels may be missing."""
    assert model.transformer is not None, "a tokenizer alone has no condition"
    if list_caption_parts(model.transformer.condition):
        return open_source(data, model.image_size, reading, captioned=True)
    return open_optional(data, model.image_size, reading)[0]


def _check_parts(condition: ConditionConfig, where: str) -> None:
    """UserError for a part whose values images of a data set do not give."""
    for part in condition.list_parts().values():
        is_given = {"text": part.batch_field == "text", "picture": bool(part.control)}
        if not is_given.get(part.kind, part.takes_labels):
            thing = _VALUES.get(part.kind, "values")
            named = f"{thing} '{part.source}'" if part.source else thing
            raise UserError(
                f"{where} draws images from {condition.describe()}, and images of a data set give no {named}: draw its "
                "images in Python with `Pipeline.sample`"
            )
