"""Reading one picture, whatever it is, as RGB of the size a model wants."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.common.errors import UserError

ImageLike = str | Path | bytes | Image.Image


def load_image(source: ImageLike, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB: first frame, turned as its EXIF says, transparency over white, 16 bits scaled down.

    `source`: a path, the bytes of a file, or a PIL image. `size` (height, width): see `fit`. Raises UserError naming
    the file when it is absent, empty, damaged, no picture, or larger than PIL's limit against decompression bombs.
    """
    name = "the image" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = to_rgb(_open(source))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} is too large to be opened safely: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no image {name}") from error
    except Exception as error:  # decoders raise nearly every type on damaged files
        reason = "it is empty" if _is_empty(source) else str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"cannot read image {name}: {reason}") from error
    return fit(image, size) if size else image


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB. Greyscale, palette, CMYK and the rest by PIL; alpha is laid over white."""
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # the pixels are sound, only the note about their orientation is not
        warnings.warn(f"ignored a damaged EXIF block: {error}", stacklevel=2)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or float, as 8-bit greyscale. PIL's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    top = 65535.0
    if image.mode == "F":  # 0..1 by convention; other ranges are taken as 0..255
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (height, width): itself if it has that size, else resized (Lanczos) until it just covers the
    size - for square sizes, on its short side - and centre-cropped."""
    height, width = size
    if image.size == (width, height):
        return image
    image = _without_far_ends(image, width / height)
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def random_crop(image: Image.Image, size: int, draws: Sequence[float]) -> Image.Image:
    """VAR's training cut: resized (Lanczos) to 1.125 times the size on the short side, then a square at random.

    `draws`: two numbers in [0, 1) that decide where.
    """
    image = _without_far_ends(image, 1.0)
    scale = round(1.125 * size) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = int(draws[0] * (width - size + 1)), int(draws[1] * (height - size + 1))
    return image.crop((left, top, left + size, top + size))


def _without_far_ends(image: Image.Image, aspect: float) -> Image.Image:
    """Cut a very long picture to 8 times the wanted aspect: resized whole, a 1 x 10000 strip would fill memory."""
    width, height = image.size
    keep_width = min(width, max(1, round(height * aspect * 8)))
    keep_height = min(height, max(1, round(width / aspect * 8)))
    left, top = (width - keep_width) // 2, (height - keep_height) // 2
    return image.crop((left, top, left + keep_width, top + keep_height))


def load_mask(mask: ImageLike, image: ImageLike, size: tuple[int, int]) -> tuple[Tensor, bool]:
    """A mask for an image, as float32 (H, W) in [0, 1] of the model's size, and whether it had to be resized to it.

    White is 1. The mask is cut and resized exactly as `load_image` does with the image; one of another size than the
    image is first resized to it. Raises UserError as `load_image`.
    """
    picture, target = load_image(mask), load_image(image).size
    resized = picture.size != target
    if resized:
        picture = picture.resize(target, Image.Resampling.BILINEAR)
    grey_HW = np.asarray(fit(picture, size).convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(grey_HW), resized


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to float32 (3, H, W) in [-1, 1], the tokenizer's range."""
    pixels_HW3 = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1
