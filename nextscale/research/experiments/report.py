"""Writes the results of an experiment: results.json, a table of published and measured values, plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from nextscale.research.experiments.front import list_fronts
from nextscale.research.experiments.intervals import LEVEL, RESAMPLES, summarize_differences, summarize_seeds
from nextscale.research.experiments.keys import list_changed_settings
from nextscale.research.experiments.scaling import format_scaling

if TYPE_CHECKING:
    from nextscale.research.experiments.folders import Inputs


def write_results(
    experiment: Experiment, inputs: Inputs, values: dict[str, list[dict[str, Any]]], folder: Path, world: World,
    details: Mapping[str, Mapping[str, Any]] | None = None, scaling: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write all results to `folder`; return the content of results.json. `values`: of each row, the metrics by seed;
    `details`: what else is known of rows, {"chosen": {row: JSON}, "progress": ..., "noise": ...}, of
    `describe_choices`, `analyse_progress` and `measure_noise`; `scaling`: of `analyse_scaling`.
    """
    rows: list[dict[str, Any]] = []
    available = dict.fromkeys(m for row in experiment.rows for v in (row.published, *values[row.name]) for m in v)
    columns: list[str] = []
    for metric in experiment.metrics:
        columns += [m for m in available if m.startswith(GROUPS[metric])] if metric in GROUPS else [metric]
    for row in experiment.rows:
        seeds = values[row.name]
        summaries = {m: summarize_seeds([seed[m] for seed in seeds]) for m in columns if seeds and m in seeds[0]}
        rows.append({"name": row.name, "at": row.x, "published": row.published, "figures": summaries})
    against = experiment.find_reference().name
    _add_differences(rows, against)
    for record in rows:
        record |= {name: found[record["name"]] for name, found in (details or {}).items() if record["name"] in found}
    network = next((seed["network"] for seeds in values.values() for seed in seeds if "network" in seed), "")
    results = {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "scale": experiment.scale,
        "seeds": list(experiment.seeds),
        "against_row": against,
        "images": experiment.images,
        "figures": columns,
        "features": network,
        "inputs": dataclasses.asdict(inputs) | _list_reading_options(experiment.reading),
        "machine": describe_machine(world.device),
        "rows": rows,
        **({"scaling": scaling} if scaling else {}),
        **({"one_training": True} if experiment.one_training else {}),
    }
    lines = group_lines(experiment.against, rows, columns, network) if experiment.against else {}
    if lines:
        judged = [column for column in columns if column in METRICS or column == "validation_loss"]
        results |= {"against": experiment.against, "fronts": list_fronts(experiment.against, rows, judged)}
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", format_table(results))
    draw_results(results, experiment.x_name, folder / "figure.png")
    if lines:
        x_name = describe_column(experiment.against, network)[0]
        circled = {"no other row is better in both": _list_front_points(results)}
        plot_curves(lines, folder / "curves.png", x_name, circled)
    return results


def group_lines(
    x: str, rows: list[dict[str, Any]], columns: list[str], network: str
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The measured metrics as lines over the metric `x`: {title: {line: [(x, mean), ...]}}.

    Rows whose names agree up to the last comma form one line.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for metric in (column for column in columns if column in METRICS or column == "validation_loss"):
        for row in rows:
            summaries, name = row["figures"], row["name"].rsplit(", ", 1)[0]
            if metric in summaries and x in summaries:
                (title, factor), (_, x_factor) = describe_column(metric, network), describe_column(x, network)
                line = panels.setdefault(title, {}).setdefault(name, [])
                line.append((x_factor * summaries[x]["mean"], factor * summaries[metric]["mean"]))
    return panels


def _list_front_points(results: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The points of `group_lines` that are on the fronts of results.json: {title: [(x, mean), ...]}."""
    points: dict[str, list[tuple[float, float]]] = {}
    for metric, names in results["fronts"].items():
        rows = [row for row in results["rows"] if row["name"] in names]
        for title, lines in group_lines(results["against"], rows, [metric], results["features"]).items():
            points[title] = [point for line in lines.values() for point in line]
    return points


def name_column(metric: str, network: str) -> str:
    """The name of a column; metrics of features carry the network's name."""
    return name_metric(metric, network) if metric in METRICS and network else metric


def _add_differences(rows: list[dict[str, Any]], against: str) -> None:
    """Add "differences" to each row: by metric, the summary of its values less those of the row `against`."""
    reference = next(row["figures"] for row in rows if row["name"] == against)
    for row in rows:
        row["differences"] = {
            metric: summarize_differences(summary["values"], reference[metric]["values"])
            for metric, summary in row["figures"].items()
            if row["name"] != against and metric in reference
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
    over = "seeds of sampling, of one training" if results.get("one_training") else "seeds"
    about += f"; mean ± standard deviation over {over}." if len(results["seeds"]) > 1 else "."
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
    lines += ["", about, *_format_intervals(results), *_format_fronts(results), *_format_progress(results["rows"])]
    lines += [*_format_noise(results["rows"], network), *_format_choices(results["rows"])]
    lines += format_scaling(results["scaling"]) if "scaling" in results else []
    return "\n".join([*lines, "", f"`{command}`, {where}.", ""])


def _format_intervals(results: dict[str, Any]) -> list[str]:
    """Lines with the intervals of the means and of the differences from the reference row, where seeds differ."""
    rows, network = [row for row in results["rows"] if row["figures"]], results["features"]
    measured = [row["figures"] for row in rows]
    metrics = [
        m for m in results["figures"] if any(m in f and "interval" in f[m] and f[m]["deviation"] for f in measured)
    ]
    if not metrics:
        return []
    head = [name_column(m, network) for m in metrics]
    share, against = f"{100 * LEVEL:.0f} %", results["against_row"]
    titles = {
        "figures": f"{share} intervals of the means, by Student's t over seeds:",
        "differences": f"Differences from {against} by equal seeds, and their {share} intervals:",
    }
    lines: list[str] = []
    for part, title in titles.items():
        shown = [row for row in rows if row[part]]
        if not shown:
            continue
        lines += ["", title, "", _format_line(["", *head]), "|---" * (len(head) + 1) + "|"]
        for row in shown:
            cells = [_format_interval(row[part].get(m), with_mean=part == "differences") for m in metrics]
            lines.append(_format_line([row["name"], *cells]))
    return lines


def _format_fronts(results: dict[str, Any]) -> list[str]:
    """Lines with the rows on the front of each metric."""
    fronts, network = results.get("fronts"), results["features"]
    if not fronts:
        return []
    x = name_column(results["against"], network)
    title = f"Rows that no other row beats in both {x} and the metric (the Pareto front, circled in curves.png):"
    lines = ["", title, ""]
    return lines + [f"- {name_column(metric, network)}: {'; '.join(names)}" for metric, names in fronts.items()]


def _format_progress(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that say for each row when it reaches the final loss of the reference."""
    found = {row["name"]: row["progress"] for row in rows if "progress" in row}
    if not found:
        return []
    reference = next(iter(found.values()))["reference"]
    lines = [
        "",
        f"Training to the final held-out loss of {reference}, interpolated between validations by equal seeds:",
    ]
    head = ["", "steps", *(f"share of its {unit}" for unit in ("steps", "FLOPs", "seconds"))]
    lines += ["", _format_line(head), "|---" * len(head) + "|"]
    for name, progress in found.items():
        parts = [progress[p] for p in ("steps", "steps_share", "flops_share", "seconds_share") if p in progress]
        cells = [_format_interval(p, with_mean=True) if "interval" in p else _format_summary(p) for p in parts]
        if not cells:
            seeds = len(progress["steps_by_seed"])
            cells = [f"not reached by {seeds - progress['seeds_that_reach_it']} of {seeds} seeds", "-", "-", "-"]
        lines.append(_format_line([name, *cells]))
    return lines


def _format_noise(rows: list[dict[str, Any]], network: str) -> list[str]:
    """Lines with the standard deviation of each metric of one training."""
    noise = {row["name"]: row["noise"] for row in rows if "noise" in row}
    if not noise:
        return []
    metrics = list(dict.fromkeys(metric for deviations in noise.values() for metric in deviations))
    lines = [
        "",
        f"Noise, the standard deviation of each metric of one training: of losses over {RESAMPLES:,} resamples of the "
        "held-out images, of samples over seeds of sampling:",
        "",
        _format_line(["", *(name_column(metric, network) for metric in metrics)]),
        "|---" * (len(metrics) + 1) + "|",
    ]
    for name, deviations in noise.items():
        cells = [_format_number(deviations[m]) if m in deviations else "-" for m in metrics]
        lines.append(_format_line([name, *cells]))
    return lines


def _format_choices(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that say for each row which settings were chosen, and the losses of all candidates."""
    chosen = {row["name"]: row["chosen"] for row in rows if "chosen" in row}
    if not chosen:
        return []
    seeds = ", ".join(map(str, next(iter(chosen.values()))["seeds"]))
    lines = ["", f"Chosen for each row by the mean held-out loss of seeds that are not reported ({seeds}):", ""]
    for name, choice in chosen.items():
        tried = [f"{_format_settings(c['settings'])}: {_format_losses(c['losses'])}" for c in choice["candidates"]]
        lines.append(f"- {name}: {_format_settings(choice['settings'])} (of {'; '.join(tried)})")
    return lines


def _format_settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('run.')} {value}" for name, value in settings.items())


def _format_losses(losses: list[float | None]) -> str:
    return " and ".join("diverged" if loss is None else _format_number(loss) for loss in losses)


def _format_interval(summary: dict[str, Any] | None, *, with_mean: bool) -> str:
    if summary is None or "interval" not in summary:
        return "-"
    low, high = map(_format_number, summary["interval"])
    return f"{_format_number(summary['mean'])} ({low} to {high})" if with_mean else f"{low} to {high}"


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
