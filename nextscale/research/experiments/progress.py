"""How fast the rows of an experiment learn: held-out loss over steps, training FLOPs and seconds, and the steps to the
final loss of the reference row.

The losses are those that training has logged at every save. A schedule that has not ended holds the loss up, so a run
of fewer steps would reach a loss earlier than is read here: the shares of steps are upper bounds for every row alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.native import read_config
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.plots import COLOURS, new_figure, save_figure
from nextscale.research.analysis.convergence import find_step, read_losses
from nextscale.research.experiments.cost import compute_training_seconds
from nextscale.research.experiments.intervals import summarize_seeds
from nextscale.training.estimate import count_training_flops
from nextscale.training.transformer import read_run_config

_LINES = 5
"""Rows in a panel, beside the reference."""
_FLOPS = {1e21: "ZFLOP", 1e18: "EFLOP", 1e15: "PFLOP", 1e12: "TFLOP", 1e9: "GFLOP", 1.0: "FLOP"}
_SECONDS = {3600.0: "hours", 60.0: "minutes", 1.0: "seconds"}


def analyse_progress(rows: Mapping[str, Sequence[Path]], reference: str, out: Path) -> dict[str, Any]:
    """Write progress.json and progress.png into `out`; return, for each row, how it reaches the reference's final loss.

    `rows`: the folders of each row's trainings, one for each seed, the seeds in the same order. `reference`: the name
    of a row. Raises UserError where trainings of a row were validated at different steps.
    """
    curves = {name: read_curves(name, folders) for name, folders in rows.items()}
    first = curves[reference]
    for curve in curves.values():
        curve["to_reference"] = _compare(curve, first)
    report = {"reference": reference, "rows": [{"name": name, **curve} for name, curve in curves.items()]}
    write_json(out / "progress.json", report)
    _plot(curves, reference, out / "progress.png")
    return {name: {"reference": reference, **curve["to_reference"]} for name, curve in curves.items()}


def read_curves(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The validations of a row's trainings, one for each seed, and what a step costs, as JSON values.

    Raises UserError where they were validated at different steps.
    """
    logs = [read_losses(str(folder))["validation"] for folder in folders]
    steps = list(logs[0])
    if any(list(log) != steps for log in logs):
        raise UserError(f"the trainings of row {name} were validated at different steps")
    losses = [[log[step]["validation_loss"] for step in steps] for log in logs]
    summaries = [summarize_seeds(values) for values in zip(*losses, strict=True)]
    run, (config, _) = read_run_config(folders[0]), read_config(folders[0])
    _, transformer = build_on_meta(config)
    assert transformer is not None, "a generator has a transformer"
    batch = run.train.batch_size
    return {
        "runs": [folder.name for folder in folders],
        "steps": steps,
        "losses": losses,
        "mean": [summary["mean"] for summary in summaries],
        "interval": [summary.get("interval", [summary["mean"]] * 2) for summary in summaries],
        "flops_per_step": batch * count_training_flops(run, config, transformer),
        "seconds_per_step": statistics.median(compute_training_seconds(folder, batch) for folder in folders),
    }


def _compare(curve: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Seed by seed, the step at which a row reaches the reference's final loss, and its share of the reference's
    steps, training FLOPs and seconds. Summaries are there if all seeds reach it."""
    reached = [
        find_step(curve["steps"], losses, other[-1])
        for losses, other in zip(curve["losses"], reference["losses"], strict=True)
    ]
    found: dict[str, Any] = {"steps_by_seed": reached, "seeds_that_reach_it": sum(step is not None for step in reached)}
    if None not in reached:
        found["steps"] = summarize_seeds([step for step in reached if step is not None])
        for unit in ("steps", "flops", "seconds"):
            cost = f"{unit}_per_step"
            share = 1.0 if unit == "steps" else curve[cost] / reference[cost]
            factor = share / reference["steps"][-1]
            found[f"{unit}_share"] = summarize_seeds([factor * step for step in found["steps"]["values"]])
    return found


def _plot(curves: dict[str, dict[str, Any]], reference: str, path: Path) -> None:
    """Loss over steps, FLOPs and seconds: a line of panels for every few rows, with the reference in each of them."""
    others = [name for name in curves if name != reference]
    groups = [others[i : i + _LINES] for i in range(0, max(len(others), 1), _LINES)]
    largest = {
        cost: max(curve["steps"][-1] * curve[cost] for curve in curves.values())
        for cost in ("flops_per_step", "seconds_per_step")
    }
    first = curves[reference]
    lowest = min(min(curve["mean"]) for curve in curves.values())
    top = first["mean"][len(first["mean"]) // 5] if len(first["mean"]) > 1 else first["mean"][0]
    margin = 0.05 * (top - lowest)
    figure, grid = new_figure(3, rows=len(groups), width=5.2, height=3.6 * len(groups))
    for axes, group in zip(grid, groups, strict=True):
        for panel, (title, cost, factor) in zip(axes, _list_axes(largest), strict=True):
            for name, colour in zip((reference, *group), ("black", *COLOURS), strict=False):
                curve = curves[name]
                x = [step * (curve[cost] if cost else 1) / factor for step in curve["steps"]]
                low, high = zip(*curve["interval"], strict=True)
                panel.plot(
                    x,
                    curve["mean"],
                    color=colour,
                    label=name,
                    linewidth=1.2,
                    linestyle="--" if colour == "black" else "-",
                )
                panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.axhline(first["mean"][-1], color="black", linestyle=":", linewidth=0.8)
            panel.set(xlabel=title)
            if margin > 0:
                panel.set_ylim(lowest - margin, top + margin)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("held-out loss (nats per token)")
        axes[2].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle("Mean over seeds and its 95 % interval; dotted: the final loss of " + reference, fontsize="medium")
    save_figure(figure, path)


def _list_axes(largest: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """The x axes: title, what a step costs there, and the unit."""
    flops, seconds = largest["flops_per_step"], largest["seconds_per_step"]
    flop = next((unit for unit in _FLOPS if flops >= unit), 1.0)
    second = next((unit for unit in _SECONDS if seconds >= unit), 1.0)
    return [
        ("training steps", "", 1.0),
        (f"training arithmetic ({_FLOPS[flop]})", "flops_per_step", flop),
        (f"training time ({_SECONDS[second]})", "seconds_per_step", second),
    ]
