"""A control picture as a condition: edges, a low resolution, a mask or a map of classes in colours.

Its patches are a sequence for cross-attention, as the control tokens of ControlVAR (arXiv 2406.09750) are tokens beside
those of the image. They need no tokenizer: a learned projection and 2D positions replace it, and a few layers give each
patch its neighbours.

Letters: B batch, C channels, H and W size in pixels, T tokens of the sequence, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.devices import create_embedding
from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for
from nextscale.config.condition import ConditionConfig
from nextscale.transformer.condition import Condition, EmbeddedCondition, get_field
from nextscale.transformer.conditions.batch import Rows, stack_rows
from nextscale.transformer.conditions.layers import average_tokens, count_layer_multiply_adds, create_layers

LOW_RESOLUTION = 4
"""How many times smaller a low resolution is, by side."""
_EDGE = 0.25
"""Gradient, of values in 0 to 1 over two pixels, from which there is an edge."""


class PictureCondition(Condition):
    """A picture: a learned first token, then its patches.

    A batch: `picture` float32 (B, C, H, W), `given` bool (B,).
    """

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        if not config.picture_size:
            raise UserError("condition.picture_size is missing: the height and width of control pictures in pixels")
        self.control, self.patch = config.control, config.patch
        self.shape = (config.picture_channels, *config.picture_size)
        rows, columns = (side // config.patch for side in config.picture_size)
        self.project = nn.Linear(self.shape[0] * config.patch**2, width)
        self.start, self.rows, self.columns = (create_embedding(count, width) for count in (1, rows, columns))
        self.layers = create_layers(config.layers, width)
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, values: Rows) -> EmbeddedCondition:
        C, p = self.shape[0], self.patch
        picture_BCHW = values["picture"]
        cells = picture_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
        x_BTD = self.project(cast_for(self.project, cells.flatten(1, 2).reshape(len(cells), -1, C * p * p)))
        positions_TD = (self.rows.weight[:, None] + self.columns.weight[None]).flatten(0, 1)
        start_B1D = self.start.weight.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        x_BTD = torch.cat([start_B1D, x_BTD + positions_TD], dim=1)
        mask_BT = values["given"][:, None].expand(-1, x_BTD.shape[1]).clone()
        mask_BT[:, 0] = True
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_BT)
        sequence_BTD = self.norm(x_BTD)
        return EmbeddedCondition(self.pool(average_tokens(sequence_BTD, mask_BT)), sequence_BTD, mask_BT)

    def parse(self, values: Sequence[Tensor | None]) -> Rows:
        """Pictures (C, H, W) with values in 0 to 1, None meaning "no picture"; UserError for another shape."""
        for value in values:
            if value is not None and tuple(value.shape) != self.shape:
                raise UserError(f"a control picture of this model is {self.shape}; got {tuple(value.shape)}")
        return stack_rows("picture", values, self.shape, self.start.weight.device)

    def from_batch(self, batch: Mapping[str, Any]) -> Rows:
        """Control pictures uint8 (B, C, H, W) of the data or a token cache; or computed from images uint8 (B, 3, H, W),
        where those are at hand."""
        if self.control and self.batch_field not in batch and "image" in batch:
            picture = compute_control(batch["image"], self.control)
        else:
            picture = get_field(batch, self.batch_field)
        if tuple(picture.shape[1:]) != self.shape:
            raise UserError(f"the model reads control pictures {self.shape}; the data have {tuple(picture.shape[1:])}")
        picture_BCHW = picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
        return Rows({"picture": picture_BCHW, "given": torch.ones_like(picture[:, 0, 0, 0], dtype=torch.bool)})

    def nothing(self, count: int) -> Rows:
        return self.parse([None] * count)

    @classmethod
    def count_tokens(cls, config: ConditionConfig) -> int:
        height, width = config.picture_size
        return 1 + (height // config.patch) * (width // config.patch)

    @classmethod
    def count_multiply_adds(cls, config: ConditionConfig, width: int) -> int:
        T = cls.count_tokens(config)
        patches = (T - 1) * config.picture_channels * config.patch**2 * width
        return patches + config.layers * count_layer_multiply_adds(T, width) + width * width


def compute_control(image_B3HW: Tensor, kind: str) -> Tensor:
    """The control picture of images, uint8 (B, 3, H, W): edges (B, 1, H, W), or a low resolution (B, 3, H, W).

    Edges are 255 where the gradient of the brightness (Sobel's operator) is large, and 0 elsewhere. A low resolution is
    the mean over 4x4 pixels, in the size of the image. UserError for another kind.
    """
    if kind == "low-resolution":
        return enlarge(reduce_resolution(image_B3HW), (image_B3HW.shape[2], image_B3HW.shape[3]))
    if kind != "edges":
        raise UserError(f"there is no control picture '{kind}'; use edges or low-resolution")
    red, green, blue = (image_B3HW.float() / 255).unbind(1)
    grey = F.pad((0.299 * red + 0.587 * green + 0.114 * blue)[:, None], (1, 1, 1, 1), mode="replicate")
    across = grey[..., 2:] - grey[..., :-2]
    along = grey[..., 2:, :] - grey[..., :-2, :]
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4
    along = (along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]) / 4
    return torch.where((across.square() + along.square()).sqrt() > _EDGE, 255, 0).to(torch.uint8)


def reduce_resolution(image_B3HW: Tensor) -> Tensor:
    """The mean over each 4x4 pixels of images uint8 (B, 3, H, W): uint8 (B, 3, H / 4, W / 4), rounded up."""
    sides = [-(-side // LOW_RESOLUTION) for side in image_B3HW.shape[2:]]
    small_B3hw = F.adaptive_avg_pool2d(image_B3HW.float() / 255, (sides[0], sides[1]))
    return (small_B3hw * 255).round().to(torch.uint8)


def enlarge(small_B3hw: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures uint8 (B, 3, h, w) in this size, height and width: each pixel is repeated."""
    return F.interpolate(small_B3hw, size, mode="nearest")
