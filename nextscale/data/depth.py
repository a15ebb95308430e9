"""Pictures of more than 8 bits per channel as 8-bit ones. Which value is white follows from what the file says.

1. A TIFF may say its largest value (SMaxSampleValue or MaxSampleValue), or that its values have 12 bits
   (BitsPerSample). A PNG may say its significant bits (sBIT): values are then scaled up to 16 bits, as the standard
   demands, or, where they cannot be, have these bits. JPEG 2000 and PGM reach PIL scaled to the full range.
2. Otherwise the largest value of the picture decides. Integers up to 255 or 4095 are 8 or 12 bits in wider words, up to
   65535 they are 16 bits, and above they have the whole range of their words. Floats below 2 have white at 1, and what
   is above 1 is cut; others have white at 255 or 65535.

A note is printed when the second rule takes less than the whole range of the words, and when the result is nearly black
or nearly white. Negative values, infinity and NaN are refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.common.notes import print_note

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_LARGEST, _SMALLEST = (341, 281), 340
_DEEP_COLOUR = ("RGB;16", "RGBX;16", "RGBA;16", "LA;16")
_CUT_BELOW = 2.0
_DARK, _BRIGHT = 16, 239
"""A picture is nearly black when 99 % of its 8-bit values are below, nearly white when 99 % are above."""


@dataclass(frozen=True)
class Depth:
    """What is known about the values of a picture before they are read."""

    word: float
    """The largest value that the words can hold; 0 for floats."""
    white: float = 0.0
    """The value of white as the file says; 0 = it does not say."""
    black: float = 0.0
    is_padded: bool = False
    """Whether `white` is of a PNG's significant bits, which are usually scaled up to the whole word."""
    is_inverted: bool = False
    """Whether 0 is white."""
    is_unsigned: bool = False
    """Whether 32-bit words are unsigned, which PIL does not know."""
    low: Image.Image | None = None
    """For 16-bit colour, of which PIL keeps the upper bytes alone: a picture of the lower bytes."""
    is_grey_alpha: bool = False
    """Whether `low` holds grey and alpha instead, the upper and the lower byte of each."""


def read_depth(image: Image.Image) -> Depth | None:
    """What the file of an image says about its values; None where they have 8 bits. Call it before `image.load()`."""
    raw_mode = _find_raw_mode(image)
    is_deep_grey = image.mode.startswith("I;16") or image.mode in ("I", "F")
    low = _open_low_bytes(image, raw_mode) if raw_mode.startswith(_DEEP_COLOUR) else None
    if low is None and not is_deep_grey:
        return None
    colour: dict[str, Any] = {"low": low, "is_grey_alpha": raw_mode.startswith("LA")}
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        return Depth(**colour, **_read_tags(tags, image.mode))
    if image.mode == "F":
        return Depth(word=0.0)
    if image.format == "PNG":
        bits = _read_significant_bits(image)
        return Depth(65535.0, 2.0**bits - 1, is_padded=True, **colour)
    if image.format in ("JPEG2000", "PPM"):
        return Depth(65535.0, 65535.0)
    return Depth(2.0**31 - 1 if image.mode == "I" else 65535.0)


def convert_to_8_bits(image: Image.Image, depth: Depth, name: str) -> Image.Image:
    """A loaded picture as 8-bit L, RGB or RGBA. `name`: for notes. UserError for values that are no brightness."""
    values = _combine_bytes(image, depth)
    has_alpha = values.ndim == 3 and values.shape[-1] in (2, 4)
    colour = values[..., :-1] if has_alpha else values
    if not np.isfinite(values).all():
        raise UserError("it has values that are NaN or infinite")
    smallest, largest = float(colour.min()), float(colour.max())
    if smallest < min(depth.black, -0.001 if not depth.word else 0.0):
        raise UserError(
            f"its values are {smallest:g} to {largest:g}, and negative ones are no brightness: convert it to 8 or 16 "
            "bits"
        )
    white = _find_white(colour, depth, name)
    pixels = _scale(colour, depth.black, white)
    pixels = 255 - pixels if depth.is_inverted else pixels
    _note_extremes(pixels, f"{name} has values up to {largest:g}, and white is {white:g}")
    transparent = image.info.get("transparency")
    if has_alpha:
        alpha = _scale(values[..., -1:], 0.0, white if values[..., -1].max() <= white else depth.word)
    elif isinstance(transparent, int | tuple):
        shown = colour != np.asarray(transparent)
        alpha = np.where(shown.any(axis=-1) if shown.ndim == 3 else shown, 255, 0).astype(np.uint8)[..., None]
    else:
        return Image.fromarray(pixels)
    rgb = (
        pixels if pixels.ndim == 3 and pixels.shape[-1] == 3 else np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)
    )
    return Image.fromarray(np.concatenate([rgb, alpha], axis=-1))


# ---- the values


def _find_raw_mode(image: Image.Image) -> str:
    """How PIL's decoder will read the pixels of a file, such as RGB;16B; "" where there is nothing to decode."""
    tiles = getattr(image, "tile", None) or [("", (), 0, "")]
    arguments = tiles[0][3]
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _open_low_bytes(image: Image.Image, raw_mode: str) -> Image.Image | None:
    """The file opened once more, so that PIL decodes the lower bytes of its 16-bit words; None where it cannot."""
    file = getattr(image, "fp", None)
    native = "L" if sys.byteorder == "little" else "B"
    order = native if raw_mode[-1] == "N" else raw_mode[-1]
    other = f"{raw_mode[:-1]}{'B' if order == 'L' else 'L'}"
    if raw_mode.startswith("LA"):
        other = "RGBA"  # four bytes, as grey and alpha of 16 bits have
    if file is None or (raw_mode.startswith("LA") and image.mode != "RGBA"):
        return None
    position = file.tell()
    file.seek(0)
    try:
        low = Image.open(file)
        low.seek(image.tell())
        low.tile = [_replace_raw_mode(tile, other) for tile in low.tile]
        low.load()
    except ValueError:  # this PIL does not know the raw mode
        return None
    finally:
        file.seek(position)
    return low


def _replace_raw_mode(tile: Any, raw_mode: str) -> Any:
    codec, extents, offset, arguments = tile
    changed = (codec, extents, offset, (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed


def _combine_bytes(image: Image.Image, depth: Depth) -> np.ndarray:
    """The values of a picture, float64 (H, W) or (H, W, channels)."""
    values = np.asarray(image)
    if depth.low is not None:
        low = np.asarray(depth.low).astype(np.float64)
        if depth.is_grey_alpha:
            return low[..., 0::2] * 256 + low[..., 1::2]
        return values.astype(np.float64) * 256 + low
    if depth.is_unsigned:
        values = values.astype(np.int64) % 2**32
    return values.astype(np.float64)


# ---- what the file says


def _read_tags(tags: Any, mode: str) -> dict[str, Any]:
    """The fields of a `Depth` from the tags of a TIFF."""
    largest = next((_read_number(tags, tag) for tag in _LARGEST if _read_number(tags, tag) > 0), 0.0)
    facts: dict[str, Any] = {"is_inverted": tags.get(_PHOTOMETRIC) == 0}
    if mode == "F":
        return facts | {"word": 0.0, "white": largest, "black": _read_number(tags, _SMALLEST) if largest else 0.0}
    bits, is_signed = int(_read_number(tags, _BITS_PER_SAMPLE)), _read_number(tags, _SAMPLE_FORMAT) == 2
    word = 2.0 ** (bits - is_signed) - 1
    white = 0.0 if bits in (16, 32) else word
    if largest:
        white = min(word, 2.0 ** int(largest).bit_length() - 1)
    return facts | {"word": word, "white": white, "is_unsigned": bits == 32 and not is_signed}


def _read_number(tags: Any, tag: int) -> float:
    """The number of a tag, the first where it has several; 0 where it is absent or no number."""
    value = tags.get(tag, 0)
    value = value[0] if isinstance(value, tuple) and value else value
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0


def _read_significant_bits(image: Image.Image) -> int:
    """The largest number of a PNG's sBIT chunk; 0 where there is none."""
    file = getattr(image, "fp", None)
    if file is None:
        return 0
    position = file.tell()
    file.seek(8)
    bits = 0
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT":
            bits = min(max(file.read(min(length, 4)), default=0), 16)
            break
        file.seek(length + 4, 1)
    file.seek(position)
    return bits


# ---- white


def _find_white(colour: np.ndarray, depth: Depth, name: str) -> float:
    """The value that becomes 255; see the rules above."""
    largest = float(colour.max())
    if depth.is_padded and depth.white:
        step = (depth.word + 1) / (depth.white + 1)
        is_scaled_up = largest > depth.white or not (colour % step).any()
        return depth.word if is_scaled_up else depth.white
    if depth.white:
        return depth.white
    if not depth.word:
        return _find_white_of_floats(largest, name)
    levels = [level for level in (255.0, 4095.0, 65535.0) if level < depth.word]
    white = next((level for level in levels if 0 < largest <= level), depth.word)
    if white < depth.word:
        bits = int(white).bit_length()
        print_note(
            f"depth {bits}",
            f"{name} does not say which value is white, and none is above {largest:g}: it was read as {bits} bits",
        )
    return white


def _find_white_of_floats(largest: float, name: str) -> float:
    if largest < _CUT_BELOW:
        if largest > 1.001:
            print_note("cut", f"{name} has values up to {largest:g}: those above 1 were cut")
        return 1.0
    white = next((level for level in (255.0, 65535.0) if largest <= level), 0.0)
    if not white:
        raise UserError(f"it has floating-point values up to {largest:g}: scale them to 0 to 1")
    print_note("float", f"{name} has floating-point values up to {largest:g}: white was taken as {white:g}")
    return white


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    return np.clip(np.rint((values - black) * (255 / (white - black))), 0, 255).astype(np.uint8)


def _note_extremes(pixels: np.ndarray, about: str) -> None:
    """Print a note when a picture is nearly black or nearly white."""
    for what, share in (("black", (pixels < _DARK).mean()), ("white", (pixels > _BRIGHT).mean())):
        if share > 0.99:
            print_note(f"nearly {what}", f"{about}: as 8 bits it is nearly {what}")
