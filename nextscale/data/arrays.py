"""Images and masks as callers of the Python interface give them: paths, PIL pictures, arrays of numpy and torch.

An array is taken as what it plainly is, or refused with what was expected and what was given:

- values: uint8, or bool, or floating point in [0, 1]. Values outside are refused, because their range cannot be known;
- one picture: (H, W), (C, H, W) or (H, W, C) with 1 (grey), 3 (RGB) or 4 (RGB and alpha, blended over white) channels;
- several: (B, C, H, W) or (B, H, W, C), or a list of pictures. Where both orders of the channels are possible, such as
  3 x H x 3, the one that gives pictures of the model's size is meant; without one the array is refused.

A picture of another size than the model's is resized and cropped as one in a file is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.data.images import ImageLike, convert_to_rgb, fit_mask, load_image, resize_and_crop, to_tensor

ImageInput = ImageLike | np.ndarray | Tensor
ImagesInput = ImageInput | Iterable[ImageInput]
Picture = Image.Image | np.ndarray
"""One picture: 8-bit RGB, or float32 (H, W, 3) in [0, 1]."""

_CHANNELS = (1, 3, 4)
_TOLERANCE = 1e-3
"""How far rounding may take floats beyond 0 and 1; they are cut."""


def load_batch(images: ImagesInput, size: tuple[int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Images of any kind as float32 (B, 3, H, W) in [-1, 1] of `size` (height, width), and a caption for each.

    A caption is the file's name, or the number of the image. Raises UserError for what is no image, and for none.
    """
    pictures, captions = list_pictures(images, size)
    return torch.stack([fit_picture(picture, size) for picture in pictures]), captions


def list_pictures(images: ImagesInput, size: tuple[int, int]) -> tuple[list[Picture], tuple[str, ...]]:
    """Images of any kind in their own sizes, and a caption for each. `size`: the model's, which decides in doubt."""
    given: list[Any] | None = list(images) if _is_list(images) else None  # type: ignore[arg-type]
    if given is None:
        pictures = _read_pictures(images, size, "the image")
        captions = [Path(images).name] if isinstance(images, str | Path) else [str(i) for i in range(len(pictures))]
        return pictures, tuple(captions)
    if not given:
        raise UserError("at least one image is needed; got none")
    pictures = []
    for i, image in enumerate(given):
        found = _read_pictures(image, size, f"image {i}")
        if len(found) != 1:
            raise UserError(f"image {i} of the list is a batch of {len(found)}: give one array, or a list of pictures")
        pictures += found
    return pictures, tuple(Path(i).name if isinstance(i, str | Path) else str(n) for n, i in enumerate(given))


def fit_picture(picture: Picture, size: tuple[int, int]) -> Tensor:
    """A picture resized and cropped to `size` (height, width), float32 (3, H, W) in [-1, 1]."""
    if isinstance(picture, Image.Image):
        return to_tensor(resize_and_crop(picture, size))
    return torch.from_numpy(_fit_floats(picture, size)).permute(2, 0, 1) * 2 - 1


def read_masked(image: ImageInput, mask: ImageInput, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One image, float32 (3, H, W) in [-1, 1] of `size`, and its mask as `read_mask` gives it."""
    pictures, _ = list_pictures(image, size)
    if len(pictures) != 1:
        raise UserError(f"edit takes one image; got {len(pictures)}")
    return fit_picture(pictures[0], size), read_mask(mask, pictures[0], size)


def find_size(picture: Picture) -> tuple[int, int]:
    """(height, width) of a picture."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else (picture.shape[0], picture.shape[1])


def read_mask(mask: ImageInput, picture: Picture, size: tuple[int, int]) -> Tensor:
    """The mask of a picture as float32 (H, W) in [0, 1] of the model's size.

    White, 1, True and 255 are 1. An image of another size than the picture is first resized to it. An array has one
    channel and the size of the model, or of the picture; it holds truth values, 0 and 1, 0 and 255, or floats in
    [0, 1]. A mask of the picture's size is resized and cropped as the picture is. UserError for anything else.
    """
    height, width = find_size(picture)
    if isinstance(mask, np.ndarray | Tensor):
        values_HW = _read_mask_values(_to_array(mask, "the mask"))
        if values_HW.shape not in (size, (height, width)):
            raise UserError(
                f"a mask tensor must be {size}; got {values_HW.shape}: give one of the model's size, or of the "
                f"image's, {(height, width)}"
            )
        fitted = values_HW if values_HW.shape == size else _fit_floats(values_HW[..., None], size)[..., 0]
        return torch.from_numpy(np.ascontiguousarray(fitted))
    if not isinstance(mask, str | Path | bytes | Image.Image):
        raise UserError(f"a mask must be a path, a PIL picture or an array; got {_name_type(mask)}")
    return fit_mask(load_image(mask), (width, height), size)[0]


# ---- one image, or an array of several


def _is_list(images: Any) -> bool:
    """Whether this is a list of images rather than an image or an array of images."""
    if isinstance(images, Tensor | str | Path | bytes | bytearray | Image.Image | Mapping | Set):
        return False
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        return array.ndim > 0 and array.dtype.kind in "OU"
    return isinstance(images, Iterable)


def _read_pictures(image: Any, size: tuple[int, int], where: str) -> list[Picture]:
    """The pictures of one image or of an array. `where`: what messages call it."""
    if isinstance(image, str | Path | bytes | bytearray | Image.Image):
        if isinstance(image, str | Path) and Path(image).is_dir():
            raise UserError(f"{image} is a folder: give its images, or use `nextscale reconstruct`")
        return [load_image(bytes(image) if isinstance(image, bytearray) else image)]
    if not isinstance(image, np.ndarray | Tensor) and not hasattr(image, "__array__"):
        raise UserError(f"{where} must be a path, a PIL picture or an array; got {_name_type(image)}")
    return [_to_picture(pixels) for pixels in _split_array(_to_array(image, where), size, where)]


def _to_array(array: Any, where: str) -> np.ndarray:
    """A numpy array of uint8, bool (as uint8 of 0 and 255) or float32 from an array of any library."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype.is_floating_point else array
        array = array.resolve_conj() if array.is_complex() else array
    values = np.asarray(array)
    if values.dtype == bool or values.dtype == np.uint8:
        return values
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _describe_array(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {tuple(array.shape)}"


def _check_values(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 or float32 values in [0, 1] of an image; UserError for others."""
    if not array.size:
        raise UserError(f"{where} has no pixels: its shape is {tuple(array.shape)}")
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return array
    expected = "expected uint8, or floating point in [0, 1]"
    if array.dtype != np.float32:
        raise UserError(f"{where} is {_describe_array(array)}; {expected}")
    if not np.isfinite(array).all():
        raise UserError(f"{where} has values that are NaN or infinite; {expected}")
    smallest, largest = float(array.min()), float(array.max())
    if smallest < -_TOLERANCE or largest > 1 + _TOLERANCE:
        hint = ""
        if smallest >= 0 and largest <= 255:
            hint = ": of values in 0 to 255 give uint8, or divide by 255"
        elif smallest >= -1 - _TOLERANCE and largest <= 1 + _TOLERANCE:
            hint = ": of values x in [-1, 1] give (x + 1) / 2"
        raise UserError(f"{where} has values from {smallest:.4g} to {largest:.4g}; {expected}{hint}")
    return array.clip(0, 1)


def _split_array(array: np.ndarray, size: tuple[int, int], where: str) -> list[np.ndarray]:
    """The pictures of an array, each (H, W, C)."""
    shape = tuple(array.shape)
    if array.ndim not in (2, 3, 4):
        raise UserError(f"{where} has the shape {shape}; {_SHAPES}")
    array = _check_values(array, where)
    if array.ndim == 2:
        return [array[..., None]]
    is_first, is_last = shape[-3] in _CHANNELS, shape[-1] in _CHANNELS
    if is_first and is_last:
        is_first, is_last = shape[-2:] == size, shape[-3:-1] == size
        if is_first == is_last:
            raise UserError(
                f"{where} has the shape {shape}, in which channels may come first or last, and the model's size "
                f"{size} does not tell: give PIL pictures"
            )
    if not (is_first or is_last):
        raise UserError(f"{where} has the shape {shape}; {_SHAPES}")
    batch = array if array.ndim == 4 else array[None]
    return list(np.moveaxis(batch, 1, -1) if is_first else batch)


_SHAPES = "expected (H, W), (C, H, W), (H, W, C), (B, C, H, W) or (B, H, W, C) with 1, 3 or 4 channels C"


def _to_picture(pixels_HWC: np.ndarray) -> Picture:
    """A picture of uint8 or float32 pixels with 1, 3 or 4 channels."""
    if pixels_HWC.dtype == np.uint8:
        pixels_HWC = pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC
        return convert_to_rgb(Image.fromarray(np.ascontiguousarray(pixels_HWC)))
    if pixels_HWC.shape[-1] == 4:
        alpha = pixels_HWC[..., 3:]
        pixels_HWC = pixels_HWC[..., :3] * alpha + (1 - alpha)
    return np.array(np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)))


def _fit_floats(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Floats in [0, 1] resized and cropped as `resize_and_crop` does, channel by channel."""
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(pixels_HWC, -1, 0)]
    return np.stack([np.asarray(resize_and_crop(channel, size)) for channel in channels], axis=-1).clip(0, 1)


def _read_mask_values(array: np.ndarray) -> np.ndarray:
    """A mask's values as float32 (H, W) in [0, 1]."""
    shape = tuple(array.shape)
    while array.ndim > 2 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or not array.size:
        raise UserError(f"a mask must have one channel, (H, W); got the shape {shape}")
    if array.dtype == bool:
        return array.astype(np.float32)
    if array.dtype == np.float32:
        if not np.isfinite(array).all() or array.min() < -_TOLERANCE or array.max() > 1 + _TOLERANCE:
            raise UserError(f"a mask's floats must lie in 0 to 1; got {array.min():.4g} to {array.max():.4g}")
        return array.clip(0, 1)
    if array.dtype.kind not in "iu":
        raise UserError(f"a mask must hold truth values or numbers; got {array.dtype}")
    levels = np.unique(array)
    if np.isin(levels, (0, 1)).all():
        return array.astype(np.float32)
    if array.dtype == np.uint8 or np.isin(levels, (0, 255)).all():
        return array.astype(np.float32) / 255
    raise UserError(f"a mask's integers must be 0 and 1, or 0 and 255; got {levels[0]} to {levels[-1]}")


def _name_type(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
