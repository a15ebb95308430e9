"""Pictures and numbers as HTML tables, in the page's own colours so that they suit its light and its dark form."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nextscale.common.pictures import encode_png

Map = Sequence[Sequence[float]]
_ANCHORS = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)]
)  # fmt: skip
"""Nine colours of viridis, which the analyses use, dark to light; the page needs no matplotlib."""


@dataclass(frozen=True)
class Cell:
    """A picture in a table."""

    image: Image.Image
    text: str
    """What it shows, for those who cannot see it and as a tip."""
    caption: str = ""


def colour_map(values: Map, highest: float = 1.0) -> Image.Image:
    """A map of values in 0 to `highest` as a picture with one pixel for each."""
    share_hw = np.clip(np.asarray(values, dtype=np.float64) / max(highest, 1e-9), 0, 1)
    channels = [np.interp(share_hw, np.linspace(0, 1, len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def draw_table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell | str]]], title: str) -> str:
    """A table with a title. Each row has a head, and as many cells as there are heads besides the first."""
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = ""
    for name, cells in rows:
        content = "".join(f"<td>{_draw_cell(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{content}</tr>'
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    name = html.escape(title)
    return f'<p class="title">{name}</p><div class="table" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def draw_legend(low: str, high: str) -> str:
    """What the colours of maps mean, from the darkest to the lightest."""
    colours = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in _ANCHORS)
    bar = f'<span class="bar" style="background: linear-gradient(to right, {colours})"></span>'
    return f'<p class="legend">{html.escape(low)} {bar} {html.escape(high)}</p>'


def draw_note(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def _draw_cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text = html.escape(cell.text)
    picture = f'<img src="{encode_picture(cell.image)}" alt="{text}" title="{text}">'
    return picture + html.escape(cell.caption)


def encode_picture(image: Image.Image) -> str:
    """A picture as the address of its own content (PNG)."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
