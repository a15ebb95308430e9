"""Plots of figures. Needs matplotlib, which is imported when the first plot is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.extras import import_extra, install_command
from nextscale.common.files import write_atomically
from nextscale.common.notes import print_note

COLOUR_MAP = "viridis"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
_MARKED_POINTS = 5
"""Lines of at most this many points get markers: a single point without one would be invisible."""
_LEGEND_IN_PANEL = 6
"""A panel of at most this many lines has its legend inside."""
_MOST_TICKS = 5
"""Intervals between the ticks of an axis of `plot_curves`: most of the time of a plot is spent on ticks."""
_MODULE = "matplotlib.figure"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    try:
        import_extra(_MODULE, "a plot")
    except UserError:
        return False
    return True


def note_missing_plot(path: Path, source: str) -> None:
    """Print one note, before the work, when `path` will not be drawn for want of matplotlib.

    `source`: the file that holds the values of the plot.
    """
    if not can_plot():
        print_note(
            "plots",
            f"{path} will not be drawn, as matplotlib cannot be imported ({install_command('matplotlib')}); {source} "
            "will hold its values",
        )


def plot_curves(
    series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, x_name: str = "step",
    circled: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] | None = None,
) -> None:  # fmt: skip
    """Line plots side by side: {panel: {line: [(x, y), ...]}}. `circled`: points with a circle, {meaning: {panel:
    [(x, y), ...]}}."""
    figure, (panels,) = new_figure(len(series))
    for axes, (panel, lines) in zip(panels, series.items(), strict=True):
        axes.locator_params(nbins=_MOST_TICKS)
        for i, (name, points) in enumerate(lines.items()):
            marker = "os^"[i // 10 % 3] if len(points) <= _MARKED_POINTS else ""  # there are ten colours
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=4)
        for meaning, points_of_panels in (circled or {}).items():
            if points_of_panels.get(panel):
                x, y = zip(*points_of_panels[panel], strict=True)
                axes.plot(x, y, "o", color="black", markersize=11, fillstyle="none", label=meaning)
        axes.set(title=panel, xlabel=x_name)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1 and len(lines) <= _LEGEND_IN_PANEL:
            axes.legend(fontsize="small")
    if any(len(lines) > _LEGEND_IN_PANEL for lines in series.values()):  # inside the panels it would cover the lines
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save_figure(figure, path)


def new_figure(panels: int, *, rows: int = 1, width: float = 5, height: float = 3.5) -> tuple[Any, Any]:
    """A figure of `rows` x `panels` axes, and the axes row by row. `width`: of one panel; `height`: of the figure."""
    figure = import_extra(_MODULE, "a plot").Figure(figsize=(width * panels, height), dpi=110, layout="constrained")
    import_extra("matplotlib.backends.backend_agg", "a plot").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels, squeeze=False)


def choose_shade(k: int, count: int) -> tuple[float, ...]:
    """The colour of scale k of `count` scales: coarse scales are darker, so the scales differ in lightness."""
    import matplotlib

    return matplotlib.colormaps[COLOUR_MAP](0.93 * k / max(count - 1, 1))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of `new_figure` as PNG."""
    with write_atomically(path) as (draft,):
        figure.canvas.print_png(draft, metadata={"Software": "nextscale"})  # draws once, `savefig` twice
