"""Image tensors as PIL images, and PIL images as files and captioned grids."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nextscale.common.contents import mark_picture
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically

_MIN_TILE = 72
_CAPTION = 14


def to_uint8(images_B3HW: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8, rounded to the nearest value. UserError for images of another type."""
    if not images_B3HW.is_floating_point():
        raise UserError(f"images must be floating point in [0, 1]; got {images_B3HW.dtype}")
    return (images_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pil(images_B3HW: Tensor) -> list[Image.Image]:
    """Float images in [0, 1], or uint8 ones, as 8-bit RGB images."""
    bytes_B3HW = images_B3HW if images_B3HW.dtype == torch.uint8 else to_uint8(images_B3HW)
    return [Image.fromarray(pixels) for pixels in bytes_B3HW.permute(0, 2, 3, 1).numpy()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image file. The suffix decides the format; PNG when PIL does not know the suffix."""
    with write_atomically(path) as (draft,):
        write_image(image, draft)


def write_image(image: Image.Image, path: Path, program: str = "nextscale") -> None:
    """Encode an image into `path`, with the name of the program that made it.

    UserError when the suffix names a format that PIL cannot write.
    """
    format_name = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    if format_name not in Image.SAVE:
        raise UserError(f"images cannot be written as {path.suffix}; use .png")
    image.save(path, format=format_name, **mark_picture(format_name, program))


def encode_png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tile_images(images: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 0) -> Image.Image:
    """Images of one size in rows, with a caption below each. Small images are enlarged without smoothing."""
    width, height = images[0].size
    zoom = max(1, math.ceil(_MIN_TILE / min(width, height)))
    width, height, caption_height = width * zoom, height * zoom, _CAPTION if any(captions) else 0
    columns = columns or min(len(images), max(1, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    gap = 4
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + caption_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + caption_height + gap)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(captions):
            draw.text((x, y + height), captions[i][: max(1, width // 6)], fill="black")
    return sheet


def save_grid(images_B3HW: Tensor, captions: Sequence[str], path: Path, columns: int = 0) -> None:
    """Write float images in [0, 1] as one captioned grid."""
    save_image(tile_images(to_pil(images_B3HW), captions, columns), path)
