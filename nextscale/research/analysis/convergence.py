"""Convergence: validation and training losses of several runs, over all scales and per scale (MEPA, Fig. 5)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.checkpoints.native import read_config
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.config.log import read_log
from nextscale.research.analysis.analyzed_model import choose_names, name_scales
from nextscale.research.analysis.figures import Band, plot_bands
from nextscale.training.transformer import TransformerTask


def analyse_convergence(runs: Sequence[str], out: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Curves of run folders of `nextscale train`; writes convergence.json and convergence.png into `out`.

    Runs of the same name (one setting with several seeds) become one curve, their mean with the sample deviation, at
    the steps that all of them have. The first name is the reference. For each curve the report has the step at which it
    reaches the reference's lowest validation loss, and the speedup over the reference. Returns the content of
    convergence.json. Raises UserError for a folder without validated steps, or for runs of different scales.
    """
    run_names = choose_names(runs, names)
    logs = {name: [read_losses(run) for run, n in zip(runs, run_names, strict=True) if n == name] for name in run_names}
    counts = {log["scales"] for same_name in logs.values() for log in same_name}
    if len(counts) > 1:
        raise UserError(f"the runs have different numbers of scales ({', '.join(map(str, sorted(counts)))})")
    curves = [_average_runs(name, same_name) for name, same_name in logs.items()]
    target = min(curves[0]["validation_loss"])
    for curve in curves:
        curve["steps_to_target"] = find_step(curve["steps"], curve["validation_loss"], target)
    for curve in curves:
        steps = curve["steps_to_target"]
        curve["speedup"] = curves[0]["steps_to_target"] / steps if steps else None
    report = {
        "analysis": "convergence",
        "reference": curves[0]["name"],
        "target": target,
        "scales": _read_scale_names(runs[0], counts.pop()),
        "curves": curves,
    }
    write_json(out / "convergence.json", report)
    _plot(report, out / "convergence.png")
    return report


def read_losses(run: str) -> dict[str, Any]:
    """A run's validation and training losses by step, from its log. UserError where it has no validated step."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no log.jsonl")
    log = [record for record in read_log(path) if record["task"] == TransformerTask.name]
    validation = {record["step"]: record for record in log if "validation_loss_per_scale" in record}
    if not validation:
        raise UserError(f"{path} has no validated step of a generator's training")
    return {
        "run": run,
        "scales": len(next(iter(validation.values()))["validation_loss_per_scale"]),
        "validation": validation,
        "training": {record["step"]: record["cross_entropy"] for record in log if "cross_entropy" in record},
    }


def _average_runs(name: str, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the runs of one name."""
    steps, training_steps = (
        [step for step in logs[0][kind] if all(step in log[kind] for log in logs)]
        for kind in ("validation", "training")
    )
    if not steps:
        raise UserError(f"the {len(logs)} runs named {name} have no validated step in common")
    loss = [_compute_mean([log["validation"][s]["validation_loss"] for log in logs]) for s in steps]
    step_losses = [[log["validation"][s]["validation_loss_per_scale"] for log in logs] for s in steps]
    per_scale = [[_compute_mean(losses) for losses in zip(*runs, strict=True)] for runs in step_losses]
    training = [_compute_mean([log["training"][s] for log in logs]) for s in training_steps]
    return {
        "name": name,
        "runs": [log["run"] for log in logs],
        "steps": steps,
        "validation_loss": [mean for mean, _ in loss],
        "validation_loss_deviation": [deviation for _, deviation in loss],
        "validation_loss_per_scale": [[mean for mean, _ in scales] for scales in per_scale],
        "validation_loss_per_scale_deviation": [[deviation for _, deviation in scales] for scales in per_scale],
        "training_steps": training_steps,
        "training_loss": [mean for mean, _ in training],
        "training_loss_deviation": [deviation for _, deviation in training],
    }


def _compute_mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation; the deviation of a single value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def find_step(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """The step at which a curve first reaches the target, interpolated linearly; None if it never does."""
    for i, loss in enumerate(losses):
        if loss <= target and i == 0:
            return float(steps[0])
        if loss <= target:
            excess = (target - loss) / (losses[i - 1] - loss)
            return steps[i] - excess * (steps[i] - steps[i - 1])
    return None


def _read_scale_names(run: str, count: int) -> list[str]:
    """Names of the scales: from the run's checkpoint where it has one, else their numbers."""
    if (Path(run) / "config.json").is_file():
        return name_scales(read_config(Path(run))[0].pyramid)
    return [f"scale {k + 1}" for k in range(count)]


def _plot(report: dict[str, Any], path: Path) -> None:
    curves, scales = report["curves"], report["scales"]
    panels: dict[str, dict[str, Band]] = {
        "validation, all scales": {
            c["name"]: (c["steps"], c["validation_loss"], c["validation_loss_deviation"]) for c in curves
        },
        "training, all scales": {
            c["name"]: (c["training_steps"], c["training_loss"], c["training_loss_deviation"]) for c in curves
        },
    }
    for k, scale in enumerate(scales):
        panels[f"validation, {scale}"] = {
            c["name"]: (c["steps"], *([row[k] for row in c[f"validation_loss_per_scale{suffix}"]]
                                      for suffix in ("", "_deviation")))
            for c in curves
        }  # fmt: skip
    plot_bands(panels, "nats per token", report["target"], path)
