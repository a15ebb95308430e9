"""Draws the results of an experiment: measured values with their spread over seeds, and published ones beside them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.common.plots import COLOURS, new_figure, save_figure
from nextscale.evaluation.compute import METRICS

GROUPS = {
    "per_scale": "nats_",
    "per_expert": "load_E",
    "seconds_per_scale": "seconds_at_",
    "attention_per_scale": "own_attention_at_",
    "attention_per_block": "own_attention_in_block_",
}
"""Names of groups of columns, and the prefix of their columns. A group is drawn in one panel."""
_WORDS: dict[str, tuple[str, float]] = {
    "parameters": ("Parameters (millions)", 1e-6),
    "active_parameters": ("Active parameters (millions)", 1e-6),
    "gflop": ("Arithmetic for one image (GFLOP)", 1),
    "flops_share": ("Arithmetic, share of the dense model's (%)", 100),
    "validation_loss": ("Held-out loss (nats per token), lower is better", 1),
    "guidance": ("Loss of semantic guidance, held out", 1),
    "load_variance": ("Variance of the experts' loads", 1),
    "tuned_loss": ("Held-out loss after tuning (nats per token)", 1),
    "hoyer": ("Hoyer penalty, held out", 1),
    "zeros": ("Hidden values that are zero (%)", 100),
    "router_error": ("Relative error of the routers' norms (%)", 100),
    "router_recall": ("Experts that the routers find (%)", 100),
    "seconds_per_epoch": ("Time of a training epoch (s)", 1),
    "own_attention": ("Attention to the token's own scale (%)", 100),
    "uniform_attention": ("The same if all visible tokens got the same (%)", 100),
    "psnr_db": ("PSNR (dB), higher is better", 1),
    "ssim": ("SSIM, higher is better", 1),
    "usage": ("Codes in use (%)", 100),
    "perplexity": ("Perplexity of the codes", 1),
}
"""Column -> title with its unit, and what values are multiplied by for it."""
_METRICS = {
    "distance": ("Fréchet distance", "lower"),
    "spatial_distance": ("Fréchet distance of spatial features", "lower"),
    "score": ("Score", "higher"),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
}
_INCEPTION = {"distance": "FID", "spatial_distance": "sFID", "score": "Inception Score"}
_GROUP_TITLES = {
    "per_expert": ("Load of each expert, of 64 tokens", "expert"),
    "seconds_per_scale": ("Time of an image by scale, in the largest batch (s)", "scale"),
    "attention_per_scale": ("Share of attention to the token's own scale, by scale", "scale"),
    "attention_per_block": ("Share of attention to the token's own scale, by block", "block"),
}
"""Group -> the title of its panel, and of the x axis."""
_BATCH = "seconds_per_image_of_"
_LEGEND_IN_PANEL = 3
"""A panel of more lines has its legend beside it."""


@dataclass(frozen=True)
class Point:
    """A value with its spread."""

    x: float | str
    mean: float
    deviation: float = 0.0
    """Over seeds."""


@dataclass(frozen=True)
class Panel:
    """What is drawn in one panel."""

    title: str
    lines: dict[str, list[Point]]
    """One line, "", of a point for each row; or, of a group of columns, a line for each row."""
    published: dict[str, list[Point]] = field(default_factory=dict)
    x_name: str = ""
    """Of a group."""
    comparable: bool = True
    """Whether published values are of the same unit and features, so that they share an axis with the measured ones."""

    @property
    def is_group(self) -> bool:
        """Whether it shows a group of columns, a line for each row."""
        return "" not in self.lines


def describe_column(column: str, network: str) -> tuple[str, float]:
    """The title of a column of results.json, with its unit, and what its values are multiplied by for it."""
    if column in METRICS:
        name, better = _METRICS.get(column, (column.replace("_", " ").capitalize(), ""))
        title = _INCEPTION.get(column, name) if network == "inception" else f"{name}, {network}'s features"
        return title + (f", {better} is better" if better else ""), 1.0
    if column.startswith(_BATCH):
        return f"Time of an image in batches of {column.removeprefix(_BATCH)} (s)", 1.0
    return _WORDS.get(column, (column.replace("_", " ").capitalize(), 1.0))


def is_higher_better(column: str) -> bool:
    """Whether more of it is better; of losses and distances, less is."""
    return _METRICS.get(column, ("", "lower"))[1] == "higher"


def draw_results(results: dict[str, Any], x_name: str, path: Path) -> None:
    """Draw the content of results.json as one panel for each column or group of columns.

    Rows at numbers are lines over `x_name`, others one below the other. Published values are diamonds; those of metrics
    have an axis of their own where they are of other features.
    """
    panels = list_panels(results)
    if not panels:
        return
    names = [row["name"] for row in results["rows"]]
    over_numbers = all(row["at"] is not None for row in results["rows"])
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    height = 3.2 if over_numbers else max(len(names) * 0.24 + 1.0, 2.4)
    width = 4.4 + max(map(len, names)) * 0.07 / columns
    figure, grid = new_figure(columns, rows=lines, width=width, height=lines * height + 0.4)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for i, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        if panel.is_group:
            _draw_group(axes, panel)
        elif over_numbers:
            _draw_over_numbers(axes, panel, x_name)
        else:
            _draw_by_name(axes, panel, names, labelled=i % columns == 0 or panels[i - 1].is_group)
    marked = [panel for panel in panels if panel.published and not panel.is_group]
    if marked:
        (handle,) = figure.axes[0].plot([], [], "D", color=COLOURS[1], fillstyle="none")
        elsewhere = "" if marked[0].comparable else " (of other models, images and features: on the coloured axis)"
        figure.legend([handle], [f"published{elsewhere}"], loc="outside lower center", fontsize="small")
    save_figure(figure, path)


def list_panels(results: dict[str, Any]) -> list[Panel]:
    """The panels of the columns that were measured, in their order; a group comes where its first column stands."""
    rows = results["rows"]
    available = dict.fromkeys(column for row in rows for column in row["figures"])
    columns = [c for c in results.get("figures", available) if any(c in row["figures"] for row in rows)]
    panels, grouped = [], set[str]()
    for column in columns:
        prefix = next((prefix for prefix in GROUPS.values() if column.startswith(prefix)), "")
        if not prefix:
            panels.append(_build_panel(results, column))
        elif prefix not in grouped:
            grouped.add(prefix)
            members = [c for c in columns if c.startswith(prefix)]
            panels.append(_build_group(rows, members, prefix))
    return panels


def _build_panel(results: dict[str, Any], column: str) -> Panel:
    title, factor = describe_column(column, results["features"])
    points, published = [], []
    for row in results["rows"]:
        x = row["name"] if row["at"] is None else row["at"]
        if column in row["figures"]:
            summary = row["figures"][column]
            points.append(Point(x, factor * summary["mean"], factor * summary["deviation"]))
        if column in row["published"]:
            published.append(Point(x, factor * row["published"][column]))
    comparable = column not in METRICS or results["scale"] == "paper"
    return Panel(title, {"": points}, {"": published} if published else {}, comparable=comparable)


def _build_group(rows: list[dict[str, Any]], columns: Sequence[str], prefix: str) -> Panel:
    """A line for each row over the group's columns. Losses per scale differ more between scales than between rows, so
    they are shown as differences from the first row, seed by seed."""
    labels = [column.removeprefix(prefix) for column in columns]
    rows = [row for row in rows if all(column in row["figures"] for column in columns)]
    if prefix == GROUPS["per_scale"]:
        first, others = rows[0], rows[1:]
        if not others:
            points = {first["name"]: _list_points(first, columns, labels)}
            return Panel("Held-out loss by scale (nats per token)", points, x_name="scale")
        lines = {
            row["name"]: [
                _compare(row["figures"][c]["values"], first["figures"][c]["values"], label)
                for c, label in zip(columns, labels, strict=True)
            ]
            for row in others
        }
        return Panel(f"Held-out loss by scale, less that of {first['name']} (nats per token)", lines, x_name="scale")
    lines = {row["name"]: _list_points(row, columns, labels) for row in rows}
    published = {
        row["name"]: [Point(label, row["published"][c]) for c, label in zip(columns, labels, strict=True)]
        for row in rows
        if all(column in row["published"] for column in columns)
    }
    title, x_name = next(_GROUP_TITLES[name] for name in _GROUP_TITLES if GROUPS[name] == prefix)
    return Panel(title, lines, published, x_name)


def _list_points(row: dict[str, Any], columns: Sequence[str], labels: Sequence[str]) -> list[Point]:
    summaries = [row["figures"][column] for column in columns]
    return [Point(label, s["mean"], s["deviation"]) for label, s in zip(labels, summaries, strict=True)]


def _compare(values: list[float], first: list[float], label: str) -> Point:
    """Mean and deviation of differences, seed by seed."""
    differences = [value - other for value, other in zip(values, first, strict=True)]
    return Point(label, statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else 0.0)


def _draw_group(axes: Any, panel: Panel) -> None:
    """A line for each row, over the names of the columns."""
    for (name, points), colour in zip(panel.lines.items(), itertools.cycle(COLOURS)):
        x = range(len(points))
        axes.plot(x, [p.mean for p in points], "o-", markersize=4, linewidth=1, color=colour, label=name)
        _draw_deviations(axes, [(i, p.mean, p.deviation) for i, p in enumerate(points)], colour, along="y")
        if name in panel.published:
            values, style = [p.mean for p in panel.published[name]], {"fillstyle": "none", "color": colour}
            axes.plot(x, values, "D--", markersize=4, linewidth=1, label=f"{name}, published", **style)
    axes.set_xticks(range(len(points)), [str(p.x) for p in points])
    axes.set_xlabel(panel.x_name)
    outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(axes.lines) > _LEGEND_IN_PANEL else {}
    axes.legend(fontsize="x-small", **outside)


def _draw_over_numbers(axes: Any, panel: Panel, x_name: str) -> None:
    points = panel.lines[""]
    axes.plot([p.x for p in points], [p.mean for p in points], "o-", markersize=4, linewidth=1, color=COLOURS[0])
    _draw_deviations(axes, [(p.x, p.mean, p.deviation) for p in points], COLOURS[0], along="y")
    axes.set_xlabel(x_name)
    if panel.published:
        other, colour = (axes, "black") if panel.comparable else (axes.twinx(), COLOURS[1])
        values = panel.published[""]
        other.plot([p.x for p in values], [p.mean for p in values], "D", color=COLOURS[1], fillstyle="none")
        other.tick_params("y", colors=colour)


def _draw_by_name(axes: Any, panel: Panel, names: list[str], *, labelled: bool) -> None:
    """Rows one below the other, the first on top."""
    height = {name: len(names) - 1 - i for i, name in enumerate(names)}
    points = [(p.mean, height[str(p.x)], p.deviation) for p in panel.lines[""]]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", markersize=4, color=COLOURS[0])
    _draw_deviations(axes, points, COLOURS[0], along="x")
    axes.set_yticks(list(height.values()), names if labelled else [""] * len(names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.locator_params("x", nbins=5)
    if panel.published:
        other, colour = (axes, "black") if panel.comparable else (axes.twiny(), COLOURS[1])
        values = [(p.mean, height[str(p.x)]) for p in panel.published[""]]
        other.plot(*zip(*values, strict=True), "D", color=COLOURS[1], fillstyle="none")
        other.tick_params("x", colors=colour)
        other.locator_params("x", nbins=5)


def _draw_deviations(axes: Any, points: Iterable[tuple[Any, Any, float]], colour: str, *, along: str) -> None:
    """Bars of one deviation to both sides of points (x, y, deviation), where there is any."""
    shown = [point for point in points if point[2]]
    if shown:
        x, y, deviation = zip(*shown, strict=True)
        bars = {f"{along}err": deviation}
        axes.errorbar(x, y, fmt="none", capsize=3, linewidth=1, ecolor=colour, **bars)
