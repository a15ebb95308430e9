"""The size at which images of different sizes are measured."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

from PIL import Image

from nextscale.common.errors import UserError
from nextscale.data.datasets import decode_image
from nextscale.data.parts import choose_part
from nextscale.data.sources import Source

_PROBED = 64
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""EXIF's tag, and its values under which width and height are swapped."""


def choose_size(source: Source) -> tuple[tuple[int, int], str]:
    """(height, width) at which all images of a source are measured, and a note where they are of different sizes.

    It is the size that more than half of the images have, else the square of the median of their short sides. Neither
    depends on the order of the images. Up to 64 images are probed first: where all have one size, the others are not
    read.
    """
    total = len(source.labels)
    probed = {_read_size(source, row) for row in choose_part(total, _PROBED).tolist()}
    if len(probed) == 1:
        return probed.pop(), ""
    sizes = [_read_size(source, row) for row in range(total)]
    size, number = Counter(sizes).most_common(1)[0]
    if number * 2 <= total:
        side = sorted(min(size) for size in sizes)[(total - 1) // 2]
        size = side, side
    height, width = size
    kinds = len({*sizes})
    return size, (
        f"the {total} images of {source.where} have {kinds} sizes; they are resized and centre-cropped to "
        f"{width} x {height}, on which the figures depend (give --size for another)"
    )


def _read_size(source: Source, row: int) -> tuple[int, int]:
    """(height, width) of an image, from its header where that is possible."""
    _, picture = source.read(row)
    if isinstance(picture, bytes | str | Path):
        try:
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION) in _TURNED
                return (width, height) if turned else (height, width)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{source.read(row)[0]} cannot be read: {str(error).splitlines()[0]}") from error
    width, height = decode_image(source, row, None)[1]
    return height, width
