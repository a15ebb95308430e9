"""Convergence: the validation and training losses of several runs, in all and per scale (MEPA, Fig. 5)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.checkpoints.native import read_config
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.research.analysis.figures import Band, bands
from nextscale.research.analysis.subject import scale_names, titles
from nextscale.training.engine.log import read_log
from nextscale.training.transformer import TransformerTask


def analyse_convergence(runs: Sequence[str], out: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Curves of run folders of `nextscale train`; writes convergence.json and convergence.png into `out`.

    Runs of the same name (one setting with several seeds) become one curve, their mean with the sample deviation, at
    the steps that all of them have. The first name is the reference: of each curve it is said at which step it reaches
    the reference's lowest validation loss, and how many times sooner than the reference that is. Returns what
    convergence.json holds. Raises UserError for a folder without validated steps, or runs of different scales.
    """
    called = titles(runs, names)
    logs = {name: [_read(run) for run, n in zip(runs, called, strict=True) if n == name] for name in called}
    counts = {log["scales"] for of_name in logs.values() for log in of_name}
    if len(counts) > 1:
        raise UserError(f"the runs have different numbers of scales ({', '.join(map(str, sorted(counts)))})")
    curves = [_curve(name, of_name) for name, of_name in logs.items()]
    target = min(curves[0]["validation_loss"])
    for curve in curves:
        curve["steps_to_target"] = _reached(curve["steps"], curve["validation_loss"], target)
    for curve in curves:
        steps = curve["steps_to_target"]
        curve["speedup"] = curves[0]["steps_to_target"] / steps if steps else None
    report = {
        "analysis": "convergence",
        "reference": curves[0]["name"],
        "target": target,
        "scales": _scales(runs[0], counts.pop()),
        "curves": curves,
    }
    write_json(out / "convergence.json", report)
    _draw(report, out / "convergence.png")
    return report


def _read(run: str) -> dict[str, Any]:
    """A run's validations and training losses, by step."""
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


def _curve(name: str, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over runs of one name."""
    steps, training_steps = (
        [step for step in logs[0][part] if all(step in log[part] for log in logs)]
        for part in ("validation", "training")
    )
    if not steps:
        raise UserError(f"the {len(logs)} runs named {name} have no validated step in common")
    loss = [_over_runs([log["validation"][s]["validation_loss"] for log in logs]) for s in steps]
    scales = [[log["validation"][s]["validation_loss_per_scale"] for log in logs] for s in steps]
    per_scale = [[_over_runs(of_scale) for of_scale in zip(*of_step, strict=True)] for of_step in scales]
    training = [_over_runs([log["training"][s] for log in logs]) for s in training_steps]
    return {
        "name": name,
        "runs": [log["run"] for log in logs],
        "steps": steps,
        "validation_loss": [mean for mean, _ in loss],
        "validation_loss_deviation": [deviation for _, deviation in loss],
        "validation_loss_per_scale": [[mean for mean, _ in of_step] for of_step in per_scale],
        "validation_loss_per_scale_deviation": [[deviation for _, deviation in of_step] for of_step in per_scale],
        "training_steps": training_steps,
        "training_loss": [mean for mean, _ in training],
        "training_loss_deviation": [deviation for _, deviation in training],
    }


def _over_runs(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _reached(steps: list[int], losses: list[float], target: float) -> float | None:
    """The step at which a curve, straight between its points, first comes down to the target; None if never."""
    for i, loss in enumerate(losses):
        if loss <= target and i == 0:
            return float(steps[0])
        if loss <= target:
            back = (target - loss) / (losses[i - 1] - loss)
            return steps[i] - back * (steps[i] - steps[i - 1])
    return None


def _scales(run: str, count: int) -> list[str]:
    """Names of the scales, from the run's checkpoint where it has one."""
    if (Path(run) / "config.json").is_file():
        return scale_names(read_config(Path(run))[0].pyramid)
    return [f"scale {k + 1}" for k in range(count)]


def _draw(report: dict[str, Any], path: Path) -> None:
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
            c["name"]: (c["steps"], *([row[k] for row in c[f"validation_loss_per_scale{part}"]]
                                      for part in ("", "_deviation")))
            for c in curves
        }  # fmt: skip
    bands(panels, "nats per token", report["target"], path)
