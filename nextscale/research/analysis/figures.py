"""Pictures of the analyses. Titles, units and numbers come from the callers; matplotlib is set up by `common.plots`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nextscale.common.plots import COLOUR_MAP, COLOURS, choose_shade, new_figure, save_figure

Band = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""x, mean and standard deviation of a curve."""
Row = tuple[str, list[Image.Image], int | None]
"""The caption of a row of images, the images, and the index of the marked one."""


def plot_expert_load(
    models: dict[str, tuple[list[str], list[float], list[str], list[list[float]]]], total: float, path: Path
) -> None:
    """Expert load: {model: (experts, load, scales, load of each scale)}, loads summing to `total`. Needs matplotlib.

    Above, bars of each expert's load and a line at the uniform load; below, a map of scales by experts.
    """
    widest = max(len(experts) for experts, *_ in models.values())
    ceiling = 1.1 * max(max(load) for _, load, _, _ in models.values())
    top = max(max(map(max, per_scale)) for *_, per_scale in models.values())
    figure, axes = new_figure(len(models), rows=2, width=max(4.0, 0.55 * widest), height=7)
    shown = None
    for (title, (experts, load, scales, per_scale)), bars, cells in zip(models.items(), axes[0], axes[1], strict=True):
        variance = statistics.variance(load) if len(load) > 1 else 0.0
        bars.bar(experts, load, color=COLOURS[0])
        bars.axhline(total / len(load), color="black", linestyle="--", linewidth=1, label="all equal")
        bars.set(title=f"{title}\nvariance {variance:.3g}", ylabel=f"load ({total:g} in all)", ylim=(0, ceiling))
        bars.legend(fontsize="small", frameon=False)
        shown = cells.imshow(per_scale, cmap=COLOUR_MAP, vmin=0, vmax=top, aspect="auto")
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
    save_figure(figure, path)


def plot_map_grids(
    models: dict[str, tuple[list[str], list[str], list[list[Any]], list[Image.Image]]], unit: str, path: Path
) -> None:
    """A grid of maps for each model, scales by experts: {model: (experts, scales, maps, pictures)}.

    `maps`: [scale][expert], each a list of rows with values in 0 to 1. `pictures`: an image in front of each row of the
    grid, or []. Needs matplotlib.
    """
    columns = max(len(experts) + bool(pictures) for experts, _, _, pictures in models.values())
    rows = max(len(scales) for _, scales, _, _ in models.values())
    figure, (panels,) = new_figure(len(models), width=0.62 * columns + 1, height=0.62 * rows + 1.1)
    shown = None
    for axes, (title, (experts, scales, maps, pictures)) in zip(panels, models.items(), strict=True):
        heads = (["image"] if pictures else []) + experts
        for k, scale_maps in enumerate(maps):
            y = len(scales) - k
            if pictures:
                axes.imshow(pictures[k], extent=_compute_extent(0, y, pictures[k].height / pictures[k].width))
            for m, values in enumerate(scale_maps, start=bool(pictures)):
                cell = _compute_extent(m, y, len(values) / len(values[0]))
                shown = axes.imshow(values, extent=cell, cmap=COLOUR_MAP, vmin=0, vmax=1, interpolation="nearest")
        _label_cells(axes, title, heads, scales)
        axes.set_ylabel("scale")
    figure.colorbar(shown, ax=panels, label=unit, shrink=0.6)
    save_figure(figure, path)


def _compute_extent(column: int, top: int, aspect: float) -> tuple[float, float, float, float]:
    """The extent (left, right, bottom, top) of a map in its cell of a grid. `aspect`: height over width."""
    half_width, half_height = 0.45 / max(aspect, 1), 0.45 * min(aspect, 1)
    x, y = column + 0.5, top - 0.5
    return x - half_width, x + half_width, y - half_height, y + half_height


def plot_points(models: dict[str, tuple[tuple[str, str], dict[str, list[list[float]]]]], path: Path) -> None:
    """Scatter plots coloured by scale: {title: (names of the axes, {scale: points})}. Needs matplotlib."""
    figure, (panels,) = new_figure(len(models), width=4.6, height=4.4)
    for axes, (title, (names, scales)) in zip(panels, models.items(), strict=True):
        for k, (scale, points) in reversed(
            list(enumerate(scales.items()))
        ):  # coarse scales have few points: draw them last
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=10, alpha=0.7, linewidths=0, color=choose_shade(k, len(scales)), label=scale)
        axes.set(title=title, xlabel=names[0], ylabel=names[1])
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="scale", loc="outside right center", markerscale=2, frameon=False)
    save_figure(figure, path)


def plot_image_rows(models: dict[str, tuple[list[str], list[Row]]], path: Path) -> None:
    """Rows of images with column heads, {title: (heads, rows)}; the marked image of a row is framed."""
    columns = max(len(heads) for heads, _ in models.values())
    count = max(len(rows) for _, rows in models.values())
    figure, (panels,) = new_figure(len(models), width=columns + 1.4, height=count + 0.7)
    for axes, (title, (heads, rows)) in zip(panels, models.items(), strict=True):
        for i, (_, pictures, marked) in enumerate(rows):
            for j, picture in enumerate(pictures):
                cell = _compute_extent(j, len(rows) - i, picture.height / picture.width)
                axes.imshow(picture, extent=cell, interpolation="nearest")
                if j == marked:
                    left, right, bottom, top = cell
                    axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=COLOURS[1],
                              linewidth=3)  # fmt: skip
        _label_cells(axes, title, heads, [name for name, _, _ in rows])
    save_figure(figure, path)


def _label_cells(axes: Any, title: str, heads: list[str], rows: list[str]) -> None:
    """Write the names of columns and rows at a grid of cells."""
    axes.set(title=title, xlim=(0, len(heads)), ylim=(0, len(rows)), aspect="equal")
    axes.set_xticks([m + 0.5 for m in range(len(heads))], heads, rotation=90 if max(map(len, heads)) > 5 else 0)
    axes.set_yticks([len(rows) - k - 0.5 for k in range(len(rows))], rows)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def plot_error_propagation(
    models: dict[str, tuple[list[str], list[dict[str, Any]], dict[str, Any]]], path: Path
) -> None:
    """The effect of errors, {model: (scales, errors, another image)} as in errors.json. Needs matplotlib.

    Above, the distance of the final image by the scale of the error; below, the tokens changed at each scale.
    """
    figure, axes = new_figure(len(models), rows=2, width=5, height=8)
    shown = None
    for (title, (scales, errors, another)), lines, cells in zip(models.items(), axes[0], axes[1], strict=True):
        names = [scales[error["scale"] - 1] for error in errors]
        mean, deviation = ([e[n] for e in errors] for n in ("image_distance", "image_distance_deviation"))
        lines.errorbar(
            names, mean, deviation, fmt="o-", color=COLOURS[1], capsize=3, label="later scales sampled again"
        )
        unchanged = [error["kept_image_distance"] for error in errors]
        lines.plot(names, unchanged, "s--", color=COLOURS[0], label="later scales keep their tokens")
        lines.axhline(another["image_distance"], color="black", linestyle=":", label="another image of the class")
        lines.set(title=title, xlabel="scale of the error", ylim=(0, None))
        lines.set_ylabel("RMS distance of the final image\nfrom the one without errors (pixels in 0 to 1)")
        lines.legend(fontsize="small", frameon=False)
        lines.grid(alpha=0.3)
        changed = [error["tokens_changed"] for error in errors]
        shown = cells.imshow(changed, cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
        cells.set_xticks(range(len(scales)), scales)
        cells.set_yticks(range(len(names)), names)
        cells.set(xlabel="scale", ylabel="scale of the error")
    figure.colorbar(shown, ax=axes[1], label="share of tokens changed")
    top = max(lines.get_ylim()[1] for lines in axes[0])
    for lines in axes[0]:
        lines.set_ylim(0, top)
    save_figure(figure, path)


def plot_bands(panels: dict[str, dict[str, Band]], unit: str, target: float, path: Path) -> None:
    """Curves over steps with a band of one deviation, {panel: {curve: band}}; the first panel marks `target`."""
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(columns, rows=rows, width=4.2, height=3.2 * rows)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(next(iter(panels.values())))}
    for panel, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, (x, mean, deviation) in curves.items():
            few = len(x) < 30
            panel.plot(
                x, mean, color=colours[name], label=name, linewidth=1.5 if few else 0.9, marker="." if few else ""
            )
            low, high = ([m + side * d for m, d in zip(mean, deviation, strict=True)] for side in (-1, 1))
            panel.fill_between(x, low, high, color=colours[name], alpha=0.2, linewidth=0)
        panel.set(title=title, xlabel="step", ylabel=unit)
        panel.grid(alpha=0.3)
    axes.flat[0].axhline(target, color="black", linestyle=":", linewidth=1, label="target")
    axes.flat[0].legend(fontsize="small", frameon=False)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    save_figure(figure, path)


def plot_attention(models: dict[str, dict[str, Any]], path: Path) -> None:
    """Attention by scales, {title: a model's report of `measure_attention`}. Needs matplotlib.

    Above, the share of a token's own scale, mean over blocks; in the middle, the same by block; below, the shares of
    all scales, mean over blocks.
    """
    scales = max(len(model["scales"]) for model in models.values())
    blocks = max(len(model["blocks"]) for model in models.values())
    height = 3.2 + (0.32 * blocks + 1.6) + (0.32 * scales + 1.6)
    figure, axes = new_figure(len(models), rows=3, width=max(5.4, 0.6 * scales + 2), height=height)
    shown = None
    for (title, model), lines, by_block, by_scale in zip(models.items(), *axes, strict=True):
        names = model["scales"]
        own = f"{model['own_share']:.0%} of the attention is to the token's own scale"
        lines.plot(names, model["own_share_per_scale"], "o-", color=COLOURS[0], label="measured, mean over blocks")
        even = model["uniform_share_per_scale"]
        lines.plot(names, even, "s--", color=COLOURS[1], label="if all visible tokens got the same")
        lines.set(title=f"{title}\n{own}", xlabel="scale of the token", ylabel="share of its own scale", ylim=(0, 1.05))
        lines.legend(fontsize="small", frameon=False)
        lines.grid(alpha=0.3)
        table = model["attention"]
        shares = [[row[k] for k, row in enumerate(block)] for block in table]
        shown = _draw_shares(by_block, shares, names, [str(block) for block in model["blocks"]])
        by_block.set(title="share of the token's own scale", xlabel="scale of the token", ylabel="block")
        every = range(len(names))
        means = [[statistics.fmean(block[k][j] for block in table) for k in every] for j in every]
        _draw_shares(by_scale, means, names, names)
        by_scale.set(title="shares of all scales, mean over blocks", xlabel="scale of the token")
        by_scale.set_ylabel("scale that gets the attention")
    figure.colorbar(shown, ax=axes[1:], label="share of the attention")
    save_figure(figure, path)


def _draw_shares(axes: Any, values: list[list[float]], columns: list[str], rows: list[str]) -> Any:
    """A map of shares with the percentage in each cell; cells of exactly 0, which nothing can reach, are empty."""
    shown = axes.imshow([[value or float("nan") for value in row] for row in values], cmap=COLOUR_MAP, vmin=0, vmax=1,
                        aspect="auto")  # fmt: skip
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value:
                ink = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize="x-small", color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 5 else 0)
    axes.set_yticks(range(len(rows)), rows)
    return shown
