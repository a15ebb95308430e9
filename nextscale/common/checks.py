"""Checks of image tensors where the package's functions take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError

_TOLERANCE = 1e-3


def check_uint8(who: str, image_B3HW: Any) -> None:
    """Raise UserError unless images are uint8 (B, 3, H, W). `who` takes them, as messages say."""
    is_tensor = isinstance(image_B3HW, Tensor)
    if not is_tensor or image_B3HW.dtype != torch.uint8 or image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3:
        raise UserError(f"{who} takes uint8 images (B, 3, H, W); got {_describe(image_B3HW)}")


def check_floats(who: str, image_B3HW: Any, low: int = -1) -> None:
    """Raise UserError unless images are floating point (B, 3, H, W), at least one. Their values are not read.

    `low`: the smallest value, for the message.
    """
    is_tensor = isinstance(image_B3HW, Tensor)
    if not is_tensor or not image_B3HW.is_floating_point() or image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3:
        raise UserError(f"{who} takes floating-point images (B, 3, H, W) in [{low}, 1]; got {_describe(image_B3HW)}")
    if not len(image_B3HW):
        raise UserError(f"{who} takes at least one image; got none")


def check_range(who: str, image_B3HW: Tensor, low: float = -1.0, high: float = 1.0) -> None:
    """Raise UserError unless all values of images lie in [low, high]: a synchronisation. NaN is refused."""
    smallest, largest = torch.stack(torch.aminmax(image_B3HW.detach())).cpu().tolist()
    if not (low - _TOLERANCE <= smallest and largest <= high + _TOLERANCE):
        raise UserError(f"{who} takes images in [{low:g}, {high:g}]; got values from {smallest:.4g} to {largest:.4g}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
