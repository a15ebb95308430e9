"""Results that people look at: grids, one image growing scale by scale, curves, maps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nextscale.errors import UserError
from nextscale.files import replacing

_MIN_TILE = 72
_CAPTION = 14
_MAP = "viridis"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
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
    with replacing(path) as (draft,):
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


def curves(series: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Line plots side by side: {panel: {line: [(x, y), ...]}}. Needs matplotlib."""
    figure, (panels,) = _figure(len(series))
    for axes, (panel, lines) in zip(panels, series.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set(title=panel, xlabel="step")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    _save_figure(figure, path)


def spreads(panels: dict[str, list[tuple[float | str, float, float]]], x_name: str, path: Path) -> None:
    """Means with deviations, (x, mean, deviation): lines over numbers, points over names. Needs matplotlib."""
    longest = max((len(str(x)) for points in panels.values() for x, _, _ in points), default=0)
    figure, (all_axes,) = _figure(len(panels), height=3.5 if longest <= 12 else 5.5)
    for axes, (panel, points) in zip(all_axes, panels.items(), strict=True):
        x, mean, deviation = zip(*points, strict=True)
        axes.errorbar(x, mean, deviation, fmt="o-" if isinstance(x[0], int | float) else "o", capsize=3, linewidth=1)
        axes.set(title=panel, xlabel=x_name)
        axes.grid(alpha=0.3)
        if isinstance(x[0], str):
            axes.tick_params("x", rotation=90 if longest > 12 else 30)
    _save_figure(figure, path)


def loads(
    models: dict[str, tuple[list[str], list[float], list[str], list[list[float]]]], total: float, path: Path
) -> None:
    """Expert load: {model: (experts, load, scales, load of each scale)}, loads summing to `total`. Needs matplotlib.

    Above, bars of each expert's load beside what it would be if all were equal; below, a map of scales by experts.
    """
    widest = max(len(experts) for experts, *_ in models.values())
    ceiling = 1.1 * max(max(load) for _, load, _, _ in models.values())
    top = max(max(map(max, per_scale)) for *_, per_scale in models.values())
    figure, axes = _figure(len(models), rows=2, width=max(4.0, 0.55 * widest), height=7)
    shown = None
    for (title, (experts, load, scales, per_scale)), bars, cells in zip(models.items(), axes[0], axes[1], strict=True):
        variance = statistics.variance(load) if len(load) > 1 else 0.0
        bars.bar(experts, load, color=_COLOURS[0])
        bars.axhline(total / len(load), color="black", linestyle="--", linewidth=1, label="all equal")
        bars.set(title=f"{title}\nvariance {variance:.3g}", ylabel=f"load ({total:g} in all)", ylim=(0, ceiling))
        bars.legend(fontsize="small", frameon=False)
        shown = cells.imshow(per_scale, cmap=_MAP, vmin=0, vmax=top, aspect="auto")
        for k, row in enumerate(per_scale):
            for m, value in enumerate(row):
                ink = "black" if value > 0.6 * top else "white"
                cells.text(m, k, f"{value:.1f}", ha="center", va="center", fontsize="x-small", color=ink)
        cells.set_xticks(range(len(experts)), experts)
        cells.set_yticks(range(len(scales)), scales)
        cells.set(xlabel="expert", ylabel="scale")
        for each in (bars, cells):
            each.tick_params("x", rotation=90 if max(map(len, experts)) > 3 else 0)
    figure.colorbar(shown, ax=axes[1], label=f"load of a scale ({total:g} in all)")
    _save_figure(figure, path)


def map_grids(
    models: dict[str, tuple[list[str], list[str], list[list[Any]], list[Image.Image]]], unit: str, path: Path
) -> None:
    """Maps of values in 0 to 1 in a grid, scale by expert: {model: (experts, scales, maps, pictures)}, side by side.

    `maps`: [scale][expert], each as rows. `pictures`: one in front of each scale, or none. Needs matplotlib.
    """
    columns = max(len(experts) + bool(pictures) for experts, _, _, pictures in models.values())
    rows = max(len(scales) for _, scales, _, _ in models.values())
    figure, (panels,) = _figure(len(models), width=0.62 * columns + 1, height=0.62 * rows + 1.1)
    shown = None
    for axes, (title, (experts, scales, maps, pictures)) in zip(panels, models.items(), strict=True):
        heads = (["image"] if pictures else []) + experts
        for k, of_scale in enumerate(maps):
            y = len(scales) - k
            if pictures:
                axes.imshow(pictures[k], extent=_cell(0, y, pictures[k].height / pictures[k].width))
            for m, values in enumerate(of_scale, start=bool(pictures)):
                cell = _cell(m, y, len(values) / len(values[0]))
                shown = axes.imshow(values, extent=cell, cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=title, xlim=(0, len(heads)), ylim=(0, len(scales)), aspect="equal", ylabel="scale")
        axes.set_xticks([m + 0.5 for m in range(len(heads))], heads, rotation=90 if max(map(len, heads)) > 5 else 0)
        axes.set_yticks([len(scales) - k - 0.5 for k in range(len(scales))], scales)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=panels, label=unit, shrink=0.6)
    _save_figure(figure, path)


def _cell(column: int, top: int, aspect: float) -> tuple[float, float, float, float]:
    """Where a map of this height by width stands in its cell of a grid: left, right, bottom, top."""
    half_width, half_height = 0.45 / max(aspect, 1), 0.45 * min(aspect, 1)
    x, y = column + 0.5, top - 0.5
    return x - half_width, x + half_width, y - half_height, y + half_height


def _figure(panels: int, *, rows: int = 1, width: float = 5, height: float = 3.5) -> tuple[Any, Any]:
    """A figure of rows of panels, each this wide, all rows together this high; and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels, squeeze=False)


def _save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as (draft,):
        figure.savefig(draft, format="png", dpi=110)
