"""Sizes of images, (height, width) in pixels, and the forms in which they are given."""

from __future__ import annotations

import re

from nextscale.common.errors import UserError

Size = int | tuple[int, int]
"""Pixels as callers give them: the side of a square, or (height, width)."""


def expand_size(size: Size) -> tuple[int, int]:
    """(height, width) of a size; UserError when it is not positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"images must have at least 1 x 1 pixels; got {height} x {width}")
    return height, width


def shorten_size(size: Size) -> Size:
    """A square's side as one number, as records of square images have it; another size as (height, width)."""
    height, width = expand_size(size)
    return height if height == width else (height, width)


def format_size(size: Size) -> str:
    """A size as text, height x width."""
    height, width = expand_size(size)
    return f"{height} x {width}"


def parse_size(option: str, text: str) -> Size:
    """The size that a user types for `option`: "0" (none), "32" (a square) or "24x32" (height x width)."""
    numbers = (
        [int(number) for number in text.lower().split("x")] if re.fullmatch(r"\d{1,6}(x\d{1,6})?", text.lower()) else []
    )
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 2 or min(numbers) < 1:
        raise UserError(f"{option} takes pixels, one number for a square (32) or HEIGHTxWIDTH (24x32); got '{text}'")
    return numbers[0], numbers[1]
