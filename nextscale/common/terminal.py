"""Pictures in a terminal."""

from __future__ import annotations

import os
import sys

from PIL.Image import Image

from nextscale.common.extras import import_extra

PACKAGE = "textual_image"
_CELL_WIDTH = 8
"""Pixels that a character is wide, or more: how wide a picture may be without being scaled down."""


def show(image: Image) -> None:
    """Print a picture: by Sixel or kitty's protocol where the terminal answers that it has them, else as coloured half
    blocks, one character for two pixels at most. A note where standard output is no terminal, or one without a size.
    UserError without textual-image.
    """
    if not (sys.__stdout__ and sys.__stdout__.isatty() and os.get_terminal_size(sys.__stdout__.fileno()).columns):
        print("note: nothing is shown, because the output is not a terminal, or does not say how wide it is")
        return
    kinds = import_extra(f"{PACKAGE}.renderable", "--show")  # asks the terminal what it has
    from rich.console import Console

    console = Console()
    size: dict[str, int | str] = {}  # as many pixels as the picture has
    if kinds.Image is kinds.HalfcellImage:
        size = {"width": min(image.width, console.width), "height": "auto"}
    elif image.width > console.width * _CELL_WIDTH:
        size = {"width": "100%", "height": "auto"}
    console.print(kinds.Image(image, **size))
