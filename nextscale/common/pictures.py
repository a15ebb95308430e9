"""Results that people look at: grids, one image growing scale by scale, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically

_MIN_TILE = 72
_CAPTION = 14
MAP = "viridis"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, which the colour-blind can tell apart."""


def to_uint8(images_B3HW: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8, rounded to the nearest value."""
    return (images_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pil(images_B3HW: Tensor) -> list[Image.Image]:
    """Float images in [0, 1], or uint8 ones, as 8-bit RGB pictures."""
    bytes_B3HW = images_B3HW if images_B3HW.dtype == torch.uint8 else to_uint8(images_B3HW)
    return [Image.fromarray(pixels) for pixels in bytes_B3HW.permute(0, 2, 3, 1).numpy()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole; the suffix decides the format, PNG when there is none that PIL knows."""
    with write_atomically(path) as (draft,):
        write_image(image, draft)


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture to a draft; UserError when its suffix names a format that cannot be written."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    if form not in Image.SAVE:
        raise UserError(f"pictures cannot be written as {path.suffix}; use .png")
    image.save(path, format=form)


def tile(pictures: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 0) -> Image.Image:
    """Pictures of one size side by side in rows, a caption below each. Small ones are enlarged without smoothing."""
    width, height = pictures[0].size
    zoom = max(1, math.ceil(_MIN_TILE / min(width, height)))
    width, height, foot = width * zoom, height * zoom, _CAPTION if any(captions) else 0
    columns = columns or min(len(pictures), max(1, math.ceil(math.sqrt(len(pictures)))))
    rows = math.ceil(len(pictures) / columns)
    gap = 4
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + foot + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + foot + gap)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(captions):
            draw.text((x, y + height), captions[i][: max(1, width // 6)], fill="black")
    return sheet


def grid(images_B3HW: Tensor, captions: Sequence[str], path: Path, columns: int = 0) -> None:
    """Write float images in [0, 1] as one captioned sheet."""
    save_image(tile(to_pil(images_B3HW), captions, columns), path)


_FEW = 5
"""Points of a line that are marked: one alone would not be seen."""
_LEGEND = 6
"""Lines whose names find room within a panel."""


def curves(series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, x_name: str = "step") -> None:
    """Line plots side by side: {panel: {line: [(x, y), ...]}}. Needs matplotlib."""
    figure, (panels,) = new_figure(len(series))
    for axes, (panel, lines) in zip(panels, series.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            marker = "os^"[i // 10 % 3] if len(points) <= _FEW else ""  # there are ten colours
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=4)
        axes.set(title=panel, xlabel=x_name)
        axes.grid(alpha=0.3)
        if 1 < len(lines) <= _LEGEND:
            axes.legend(fontsize="small")
    if any(len(lines) > _LEGEND for lines in series.values()):  # in the panels it would hide what they show
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save_figure(figure, path)


_ACROSS = 4
"""Panels side by side, so that a picture of many can still be read on a page."""


def spreads(panels: dict[str, list[tuple[float | str, float, float]]], x_name: str, path: Path) -> None:
    """Means with deviations, (x, mean, deviation): lines over numbers, points over names. Needs matplotlib."""
    longest = max((len(str(x)) for points in panels.values() for x, _, _ in points), default=0)
    columns = min(len(panels), _ACROSS)
    rows = -(-len(panels) // columns)
    figure, grid_of_axes = new_figure(columns, rows=rows, height=rows * (3.5 if longest <= 12 else 5.5))
    for axes in grid_of_axes.flat[len(panels) :]:
        axes.remove()
    for axes, (panel, points) in zip(grid_of_axes.flat, panels.items(), strict=False):
        x, mean, deviation = zip(*points, strict=True)
        axes.errorbar(x, mean, deviation, fmt="o-" if isinstance(x[0], int | float) else "o", capsize=3, linewidth=1)
        axes.set(title=panel, xlabel=x_name)
        axes.grid(alpha=0.3)
        if isinstance(x[0], str):
            axes.tick_params("x", rotation=90 if longest > 12 else 30)
    save_figure(figure, path)


def new_figure(panels: int, *, rows: int = 1, width: float = 5, height: float = 3.5) -> tuple[Any, Any]:
    """A figure of rows of panels, each this wide, all rows together this high; and its axes, row by row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of curves and maps need matplotlib: pip install 'nextscale[quickstart]'") from None
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels, squeeze=False)


def shade(k: int, count: int) -> tuple[float, ...]:
    """The colour of scale k of so many: darker where coarse, so that lightness alone tells them apart."""
    import matplotlib

    return matplotlib.colormaps[MAP](0.93 * k / max(count - 1, 1))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure whole, as PNG."""
    with write_atomically(path) as (draft,):
        figure.savefig(draft, format="png", dpi=110)
