"""Results of `nextscale tune`: results.json, a table, a picture of time against distance, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nextscale.common.digest import add_digest
from nextscale.common.files import write_json, write_text
from nextscale.common.pictures import save_grid
from nextscale.common.plots import COLOURS, new_figure, save_figure
from nextscale.config.parse import to_dict
from nextscale.evaluation.metrics.paired import PairedLoss
from nextscale.tune.measure import ModelMeasurer
from nextscale.tune.options import DENSE, Candidate
from nextscale.tune.search import CONFIDENCE, Found, Result

RESULTS = "results.json"
_COLUMNS = 8
_LETTERS = "ABCDEFGH"
"""Names of the finalists in the pictures."""


def build_report(found: Found, measurer: ModelMeasurer, metric: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json. `metric`: such as classifier_fd; `facts`: what was measured where, by name."""
    finalists = [result.candidate.name for result in found.finalists]
    rows = [_report_result(result, measurer, found.confidence) for result in found.results]
    rows.sort(key=lambda row: (-row["stage"], -row["selection"]["times_as_fast"]))
    for row in rows:
        if row["name"] in finalists:
            row["finalist"] = _LETTERS[finalists.index(row["name"])]
    largest = max((result.loss for result in found.results), key=lambda loss: loss.images, default=None)
    return {
        **facts,
        "metric": metric,
        "confidence": CONFIDENCE,
        "seconds": round(measurer.seconds, 1),
        "winner": found.winner.candidate.name if found.winner else None,
        "dense": {} if largest is None else {"distance": largest.baseline, "images": largest.images},
        "rows": rows,
        "refused": found.refused,
    }


def _report_result(result: Result, measurer: ModelMeasurer, confidence: float) -> dict[str, Any]:
    changed = {name: value for option in result.candidate.options for name, value in option.sampling.items()}
    row = {
        "name": result.candidate.name,
        "dtype": result.candidate.dtype,
        "sampling": to_dict(changed),
        "stage": result.rung,
        "selection": _report_measurements(result, result.speed, result.loss, measurer, held_out=False),
    }
    if result.held_out is not None:
        held_out = _report_measurements(result, result.held_out_speed, result.held_out, measurer, held_out=True)
        held_out["loss_at_most_of_all_finalists"] = result.held_out.bound(confidence)
        row["held_out"] = held_out
    return row


def _report_measurements(
    result: Result, speed: float, loss: PairedLoss, measurer: ModelMeasurer, *, held_out: bool
) -> dict[str, Any]:
    dense, seconds = measurer.list_seconds(result.candidate, held_out)
    ratios = [a / b for a, b in measurer.rounds[result.candidate.name, held_out]]
    return {
        "times_as_fast": speed,
        "times_as_fast_range": [min(ratios), max(ratios)],
        "rounds": len(ratios),
        "seconds_per_image": seconds,
        "seconds_per_image_dense": dense,
        "images": loss.images,
        "distance": loss.distance,
        "distance_dense": loss.baseline,
        "loss": loss.loss,
        "loss_error": loss.error,
        "loss_at_most": loss.bound(),
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write results.json, table.md and pareto.png."""
    write_json(folder / RESULTS, add_digest(report))
    write_text(folder / "table.md", format_table(report))
    draw_times(report, folder / "pareto.png")


def format_table(report: dict[str, Any]) -> str:
    """The results as Markdown: the finalists with both halves, then all others."""
    metric, machine = report["metric"], report["machine"]
    head = ["settings", "ms an image", "times as fast", f"{metric}", "at most", "images"]
    lines = [f"# Settings of {report['model']}", ""]
    finalists = sorted((row for row in report["rows"] if "finalist" in row), key=lambda row: row["finalist"])
    if finalists:
        lines += [
            "On held-out images, seeds and half of the reference; in brackets where they were chosen.", "",
            _format_line(["", *head]), "|---" * (len(head) + 1) + "|",
        ]  # fmt: skip
    for row in finalists:
        pairs = zip(_list_cells(row["held_out"]), _list_cells(row["selection"]), strict=True)
        name = f"**{row['name']}**" if row["name"] == report["winner"] else row["name"]
        lines.append(_format_line([row["finalist"], name, *(f"{held} ({chosen})" for held, chosen in pairs)]))
    lines += ["", "All settings that were measured, on the half by which the finalists were chosen.", ""]
    lines += [_format_line([*head, "rounds"]), "|---" * (len(head) + 1) + "|"]
    lines += [_format_line([r["name"], *_list_cells(r["selection"]), str(r["stage"])]) for r in report["rows"]]
    lines += [f"| {name} | refused: {reason} |" for name, reason in report["refused"].items()]
    dense = [row["selection"]["seconds_per_image_dense"] for row in report["rows"]]
    about = (
        f"Times of batches of {report['batch']} ({report['clock']} time), each setting and the dense model in turn, "
    )
    about += "medians of rounds"
    about += f"; the dense model takes {1000 * sorted(dense)[len(dense) // 2]:.1f} ms an image." if dense else "."
    about += f" {metric} is relative to the dense model in float32 with the same seeds and labels, ± its standard "
    about += "error. At most: upper 95 % bound. Rounds: how often a setting was chosen to be measured on more images."
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, "", about, "", f"`{report['command']}`, {where}.", ""])


def _list_cells(measured: dict[str, Any]) -> list[str]:
    return [
        f"{1000 * measured['seconds_per_image']:.1f}",
        f"{measured['times_as_fast']:.2f}",
        f"{measured['loss']:+.1%} ± {measured['loss_error']:.1%}".replace("%", " %"),
        f"{measured['loss_at_most']:+.1%}".replace("%", " %"),
        f"{measured['images']:,}",
    ]


def _format_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_times(report: dict[str, Any], path: Path) -> None:
    """Seconds an image against the Fréchet distance: all settings where they were chosen, the finalists held out."""
    figure, (panels,) = new_figure(2, width=6.5, height=4.8)
    titles = {"selection": "all settings, on the images to choose by", "held_out": "finalists, on held-out images"}
    for axes, (half, title) in zip(panels, titles.items(), strict=True):
        rows = [row for row in report["rows"] if half in row]
        axes.set(
            title=title, xlabel="seconds an image", ylabel=f"Fréchet distance ({report['metric']}), ± standard error"
        )
        axes.grid(alpha=0.3)
        if rows:
            _draw_half(axes, rows, half, report["max_loss"])
    save_figure(figure, path)


def _draw_half(axes: Any, rows: list[dict[str, Any]], half: str, max_loss: float) -> None:
    """The points of one half. A distance is that of the dense model on most images, times the setting's ratio to it on
    the images that both were measured on: a distance by itself falls with the number of images."""
    most = max((row[half] for row in rows), key=lambda measured: measured["images"])
    dense, seconds = most["distance_dense"], most["seconds_per_image_dense"]
    points = [
        (seconds / row[half]["times_as_fast"], dense * (1 + row[half]["loss"]), dense * row[half]["loss_error"])
        for row in rows
    ]
    axes.errorbar(*zip(*points, strict=True), fmt="o", color=COLOURS[0], markersize=4, elinewidth=0.6, alpha=0.7)
    axes.plot(seconds, dense, "s", color=COLOURS[6], label="dense, float32")
    axes.axhline(
        dense * (1 + max_loss),
        color=COLOURS[1],
        linewidth=1,
        linestyle="--",
        label=f"largest distance allowed ({max_loss:+.1%})",
    )
    front = _find_front([(seconds, dense), *((x, y) for x, y, _ in points)])
    axes.plot(*zip(*front, strict=True), color=COLOURS[2], linewidth=1, label="no setting is better in both")
    for row, (x, y, _) in zip(rows, points, strict=True):
        if "finalist" in row:
            axes.annotate(row["finalist"], (x, y), xytext=(5, 5), textcoords="offset points", weight="bold")
            if half == "held_out":
                axes.plot([], [], " ", label=f"{row['finalist']}: {row['name']}")
    axes.legend(fontsize="small")


def _find_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_samples(measurer: ModelMeasurer, finalists: Sequence[Result], path: Path) -> None:
    """Samples with equal seeds and labels or other conditions: a row of the dense model, then one of each finalist."""
    tensors, captions = [], []
    for letter, candidate in _name_rows([result.candidate for result in finalists]):
        pipeline = measurer.load(candidate.dtype)
        given = measurer.give(pipeline, _COLUMNS)
        images = pipeline.sample(config=candidate.change(measurer.base), batch_size=measurer.config.batch, **given)
        tensors.append(images.tensor)
        captions += [f"{letter} {caption}" for caption in images.captions]
    save_grid(torch.cat(tensors), captions, path, columns=_COLUMNS)


def _name_rows(finalists: Sequence[Candidate]) -> list[tuple[str, Candidate]]:
    return [("dense", DENSE), *zip(_LETTERS, finalists, strict=False)]
