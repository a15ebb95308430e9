"""Reads one image file of any common format as RGB, resizes and crops it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.sizes import Size, expand_size
from nextscale.data.depth import convert_to_8_bits, read_depth

ImageLike = str | Path | bytes | Image.Image
_ORIENTATION = 0x0112
"""EXIF's number of how a picture is to be turned; 5 to 8 exchange width and height."""


def load_image(source: ImageLike, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB: first frame, rotated as its EXIF block says, transparency over white, 16 bits scaled.

    `source`: a path, the bytes of a file, or a PIL image. `size` (height, width): see `resize_and_crop`. Raises
    UserError naming the file when it is absent, empty, damaged, no image, or larger than PIL's limit against
    decompression bombs.
    """
    name = "the image" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = convert_to_rgb(_open(source), name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} is too large to be opened safely: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no image {name}") from error
    except Exception as error:  # decoders raise nearly every type on damaged files
        reason = "it is empty" if _is_empty(source) else str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"cannot read image {name}: {reason}") from error
    return resize_and_crop(image, size) if size else image


def read_size(source: ImageLike) -> tuple[int, int]:
    """Width and height of an image as `load_image` gives it, from its header; (1, 1) where that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return source.size
            with _open(source) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
    except Exception:  # decoders raise nearly every type on damaged files
        return 1, 1


def _open(source: ImageLike) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _is_empty(source: ImageLike) -> bool:
    if isinstance(source, Image.Image):
        return False
    return (
        len(source) == 0 if isinstance(source, bytes) else Path(source).is_file() and Path(source).stat().st_size == 0
    )


def convert_to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Any PIL image as 8-bit RGB. PIL converts greyscale, palette, CMYK and the rest; alpha is blended over white.

    Values of more than 8 bits are scaled as `nextscale.data.depth` says. `name`: for notes.
    """
    if 0 in image.size:
        raise UserError("it has no pixels")
    depth = read_depth(image)
    image.load()
    image = _turn_upright(image)
    if depth is not None:
        low = _turn_upright(depth.low) if depth.low is not None else None
        image = convert_to_8_bits(image, replace(depth, low=low), name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image  # PIL does not convert it to others
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image rotated as its EXIF block says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the pixels are intact, only the orientation is unknown
        warnings.warn(f"ignored a damaged EXIF block: {error}", stacklevel=2)
        return image


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize (Lanczos) to the smallest image that covers `size` (height, width), then crop the centre.

    For square sizes that is a resize of the short side. An image that has the size is returned unchanged.
    """
    height, width = size
    if image.size == (width, height):
        return image
    image = _crop_extreme_aspect(image, width / height)
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def crop_randomly(image: Image.Image, size: Size, draws: Sequence[float]) -> Image.Image:
    """VAR's training crop: resize (Lanczos) to the smallest image that covers 1.125 times `size`, then crop at random.

    For squares the short side is resized. `draws`: two random numbers in [0, 1), the position of the crop from left and
    from top.
    """
    height, width = expand_size(size)
    image = _crop_extreme_aspect(image, width / height)
    scale = max(round(1.125 * width) / image.width, round(1.125 * height) / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = int(draws[0] * (covering[0] - width + 1)), int(draws[1] * (covering[1] - height + 1))
    return image.crop((left, top, left + width, top + height))


def _crop_extreme_aspect(image: Image.Image, aspect: float) -> Image.Image:
    """Crop a very long image to 8 times the target aspect ratio: resizing a whole 1 x 10000 strip would fill memory."""
    width, height = image.size
    new_width = min(width, max(1, round(height * aspect * 8)))
    new_height = min(height, max(1, round(width / aspect * 8)))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def load_mask(mask: ImageLike, image: ImageLike, size: tuple[int, int]) -> tuple[Tensor, bool]:
    """The mask of an image as float32 (H, W) in [0, 1] of the model's size, and whether it was resized to the image.

    White is 1. A mask of another size than the image is first resized to it; then it is resized and cropped exactly as
    `load_image` does with the image. Raises UserError in the same cases as `load_image`.
    """
    return fit_mask(load_image(mask), load_image(image).size, size)


def fit_mask(mask: Image.Image, target: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, bool]:
    """As `load_mask`, of a mask and the (width, height) of the image."""
    resized = mask.size != target
    if resized:
        mask = mask.resize(target, Image.Resampling.BILINEAR)
    grey_HW = np.asarray(resize_and_crop(mask, size).convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(grey_HW), resized


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1], the tokenizer's range."""
    pixels_HW3 = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1
