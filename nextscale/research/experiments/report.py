"""Writes the results of an experiment: results.json, a table of published and measured values, plots."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.common.distributed import World
from nextscale.common.files import write_json, write_text
from nextscale.common.machine import describe_machine
from nextscale.common.plots import plot_curves
from nextscale.config.data import ReadConfig
from nextscale.evaluation.compute import METRICS, name_metric
from nextscale.research.experiments.entry import Experiment
from nextscale.research.experiments.figures import GROUPS, describe_column, draw_results
from nextscale.research.experiments.keys import list_changed_settings

if TYPE_CHECKING:
    from nextscale.research.experiments.runner import Inputs


def write_results(
    experiment: Experiment, inputs: Inputs, values: dict[str, list[dict[str, Any]]], folder: Path, world: World
) -> dict[str, Any]:
    """Write all results to `folder`; return the content of results.json. `values`: of each row, the metrics by seed."""
    rows: list[dict[str, Any]] = []
    available = dict.fromkeys(m for row in experiment.rows for v in (row.published, *values[row.name]) for m in v)
    columns: list[str] = []
    for metric in experiment.metrics:
        columns += [m for m in available if m.startswith(GROUPS[metric])] if metric in GROUPS else [metric]
    for row in experiment.rows:
        seeds = values[row.name]
        summaries = {m: _summarize_seeds([seed[m] for seed in seeds]) for m in columns if seeds and m in seeds[0]}
        rows.append({"name": row.name, "at": row.x, "published": row.published, "figures": summaries})
    network = next((seed["network"] for seeds in values.values() for seed in seeds if "network" in seed), "")
    results = {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "scale": experiment.scale,
        "seeds": list(experiment.seeds),
        "images": experiment.images,
        "figures": columns,
        "features": network,
        "inputs": dataclasses.asdict(inputs) | _list_reading_options(experiment.reading),
        "machine": describe_machine(world.device),
        "rows": rows,
    }
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", format_table(results))
    draw_results(results, experiment.x_name, folder / "figure.png")
    if experiment.against:
        lines = group_lines(experiment.against, rows, columns, network)
        plot_curves(lines, folder / "curves.png", describe_column(experiment.against, network)[0])
    return results


def group_lines(
    x: str, rows: list[dict[str, Any]], columns: list[str], network: str
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The measured metrics as lines over the metric `x`: {title: {line: [(x, mean), ...]}}.

    Rows whose names agree up to the last comma form one line.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for metric in (column for column in columns if column in METRICS):
        for row in rows:
            summaries, name = row["figures"], row["name"].rsplit(", ", 1)[0]
            if metric in summaries and x in summaries:
                (title, factor), (_, x_factor) = describe_column(metric, network), describe_column(x, network)
                line = panels.setdefault(title, {}).setdefault(name, [])
                line.append((x_factor * summaries[x]["mean"], factor * summaries[metric]["mean"]))
    return panels


def name_column(metric: str, network: str) -> str:
    """The name of a column; metrics of features carry the network's name."""
    return name_metric(metric, network) if metric in METRICS and network else metric


def _summarize_seeds(values: list[float]) -> dict[str, Any]:
    return {
        "values": values,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def format_table(results: dict[str, Any]) -> str:
    """The Markdown table: published values under their published names, then the measured ones."""
    rows, network, inputs = results["rows"], results["features"], results["inputs"]
    measured = [m for m in results["figures"] if any(m in row["figures"] for row in rows)]
    published = [m for m in results["figures"] if any(m in row["published"] for row in rows)]
    head = [results["experiment"], *(f"{name_column(m, 'inception')}, published" for m in published)]
    head += [name_column(m, network) for m in measured]
    lines = [f"# {results['title']}", "", f"{results['source']}.", "", _format_line(head), "|---" * len(head) + "|"]
    for row in rows:
        cells = [_format_number(row["published"][m]) if m in row["published"] else "not available" for m in published]
        cells += [_format_summary(row["figures"].get(m)) for m in measured]
        lines.append(_format_line([row["name"], *cells]))
    seeds = ", ".join(map(str, results["seeds"]))
    images = f"{results['images']:,} images of each row" if results["images"] else "no images sampled"
    about = f"Scale {results['scale']}: {images}, seeds {seeds}"
    about += "; mean ± standard deviation over seeds." if len(results["seeds"]) > 1 else "."
    if results["scale"] != "paper":
        about += (
            " Published values are of ImageNet at 256 pixels, measured ones of smaller models and images: compare rows "
            "with rows, not columns."
        )
    given = {name: value for name, value in inputs.items() if value not in ("", "train")}
    options = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
    command = f"nextscale experiment run {results['experiment']} --scale {results['scale']} {options}"
    machine = results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, "", about, "", f"`{command}`, {where}.", ""])


def _list_reading_options(reading: ReadConfig) -> dict[str, Any]:
    """Options of how data sets are read that differ from their defaults."""
    return {f"images.{name.replace('_', '-')}": value for name, value in list_changed_settings(reading).items()}


def _format_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _format_summary(summary: dict[str, Any] | None) -> str:
    """Mean, with the deviation where the seeds differ; a dash where the row lacks the metric."""
    if summary is None:
        return "-"
    mean, deviation = _format_number(summary["mean"]), summary["deviation"]
    return f"{mean} ± {_format_number(deviation)}" if deviation else mean


def _format_number(value: float) -> str:
    """Four significant digits; large counts with commas."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
