"""What an experiment leaves behind: results.json, a table with the published figures beside ours, a picture."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.common.distributed import World
from nextscale.common.files import write_json, write_text
from nextscale.common.machine import describe_machine
from nextscale.common.plots import plot_curves, plot_means
from nextscale.evaluation.compute import METRICS, name_metric
from nextscale.research.experiments.entry import Experiment

if TYPE_CHECKING:
    from nextscale.research.experiments.lab import Inputs

_GROUPS = {"per_scale": "nats_", "per_expert": "load_E"}
"""Names for many columns at once, and how those begin."""


def write_results(
    experiment: Experiment, inputs: Inputs, values: dict[str, list[dict[str, Any]]], folder: Path, world: World
) -> dict[str, Any]:
    """Write everything into `folder`; `values`: by row, the figures of each seed. Returns what results.json holds."""
    rows: list[dict[str, Any]] = []
    found = dict.fromkeys(f for row in experiment.rows for m in (row.published, *values[row.name]) for f in m)
    columns = [
        c for f in experiment.figures
        for c in ([n for n in found if n.startswith(_GROUPS[f])] if f in _GROUPS else [f])
    ]  # fmt: skip
    for row in experiment.rows:
        measured = values[row.name]
        figures = {f: _spread([m[f] for m in measured]) for f in columns if measured and f in measured[0]}
        rows.append({"name": row.name, "at": row.x, "published": row.published, "figures": figures})
    network = next((m["network"] for found in values.values() for m in found if "network" in m), "")
    results = {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "scale": experiment.scale,
        "seeds": list(experiment.seeds),
        "images": experiment.images,
        "figures": columns,
        "features": network,
        "inputs": dataclasses.asdict(inputs),
        "machine": describe_machine(world.device),
        "rows": rows,
    }
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table(results))
    panels = {
        ours(figure, network): [
            (row["name"] if row["at"] is None else row["at"], row["figures"][figure]["mean"],
             row["figures"][figure]["deviation"])
            for row in rows if figure in row["figures"]
        ]
        for figure in columns
    }  # fmt: skip
    plot_means({name: points for name, points in panels.items() if points}, experiment.x_name, folder / "figure.png")
    if experiment.against:
        plot_curves(_over(experiment.against, rows, columns, network), folder / "curves.png", experiment.against)
    return results


def _over(
    x: str, rows: list[dict[str, Any]], columns: list[str], network: str
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Each figure that was measured, as lines over the figure `x`: {figure: {line: [(x, mean), ...]}}."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for figure in (column for column in columns if column in METRICS):
        for row in rows:
            found = row["figures"]
            if figure in found and x in found:
                line = panels.setdefault(ours(figure, network), {}).setdefault(row["name"].rsplit(", ", 1)[0], [])
                line.append((found[x]["mean"], found[figure]["mean"]))
    return panels


def ours(figure: str, network: str) -> str:
    """What a figure is called that was measured with these features."""
    return name_metric(figure, network) if figure in METRICS and network else figure


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "values": values,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown table: published figures, under their published names, beside ours."""
    rows, network, inputs = results["rows"], results["features"], results["inputs"]
    figures = [f for f in results["figures"] if any(f in row["figures"] for row in rows)]
    published = [f for f in results["figures"] if any(f in row["published"] for row in rows)]
    head = [results["experiment"], *(f"{ours(f, 'inception')}, published" for f in published)]
    head += [ours(f, network) for f in figures]
    lines = [f"# {results['title']}", "", f"{results['source']}.", "", _line(head), "|---" * len(head) + "|"]
    for row in rows:
        cells = [_number(row["published"][f]) if f in row["published"] else "not available" for f in published]
        lines.append(_line([row["name"], *cells, *(_measured(row["figures"].get(f)) for f in figures)]))
    seeds = ", ".join(map(str, results["seeds"]))
    images = f"{results['images']:,} images of each row" if results["images"] else "no images drawn"
    about = f"Scale {results['scale']}: {images}, seeds {seeds}"
    about += "; mean ± standard deviation over seeds." if len(results["seeds"]) > 1 else "."
    if results["scale"] != "paper":
        about += (
            " Published figures are of ImageNet at 256 pixels, ours of smaller models and images: compare rows with "
            "rows, not columns."
        )
    options = " ".join(f"--{name} {value}" for name, value in inputs.items() if value not in ("", "train"))
    command = f"nextscale experiment run {results['experiment']} --scale {results['scale']} {options}"
    machine = results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, "", about, "", f"`{command}`, {where}.", ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measured(figure: dict[str, Any] | None) -> str:
    """Mean, with the deviation where the seeds differ; a dash where the row has no such figure."""
    if figure is None:
        return "-"
    return _number(figure["mean"]) + (f" ± {_number(figure['deviation'])}" if figure["deviation"] else "")


def _number(value: float) -> str:
    """Four digits that matter, large counts with commas."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
