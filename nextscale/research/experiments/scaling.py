"""Held-out loss against training FLOPs over the sizes of a model: a power law with its uncertainty, and a prediction.

loss = factor * FLOPs^-exponent, fitted by least squares of the logarithms over all sizes and seeds. The uncertainty is
that of seeds: the fit is repeated on seeds that are drawn again, with replacement, within each size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.checkpoints import build_on_meta
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.plots import COLOURS, new_figure, save_figure
from nextscale.config.files import read_settings
from nextscale.config.presets import preset
from nextscale.config.transformer_training import RunConfig
from nextscale.research.experiments.progress import read_curves
from nextscale.training.estimate import IMAGENET, count_training_flops

TARGET = "var-d16"
_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)
"""Percentiles of the 95 % intervals."""


def analyse_scaling(rows: Mapping[str, Sequence[Path]], out: Path) -> dict[str, Any]:
    """Fit every family of rows, whose names agree up to the last comma; write scaling.json and scaling.png into `out`.

    `rows`: the folders of each row's trainings, one for each seed. Returns the content of scaling.json. Raises
    UserError for a family of one size.
    """
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for name, folders in rows.items():
        curve = read_curves(name, folders)
        losses = [values[-1] for values in curve["losses"]]
        points.setdefault(name.rsplit(", ", 1)[0], []).append((curve["steps"][-1] * curve["flops_per_step"], losses))
    target = count_target_flops()
    families = {name: fit_family(name, sizes, target) for name, sizes in points.items()}
    report = {
        "target": TARGET,
        "target_flops": target,
        "note": f"the losses at the target are predictions, far outside of what was measured: of these data and this "
        f"tokenizer at the training FLOPs of the recipe {TARGET}, if the power law held until there",
        "families": families,
    }
    write_json(out / "scaling.json", report)
    _plot(families, out / "scaling.png")
    return report


def count_target_flops() -> float:
    """Training FLOPs of the recipe whose loss is predicted, on ImageNet."""
    run, config = read_settings(RunConfig, Path(TARGET)), preset(TARGET)
    _, transformer = build_on_meta(config)
    assert transformer is not None, "a generator has a transformer"
    steps, _ = run.train.schedule_steps(IMAGENET)
    return float(count_training_flops(run, config, transformer) * steps * run.train.batch_size)


def fit_power_law(flops_N: np.ndarray, losses_N: np.ndarray) -> tuple[float, float]:
    """(factor, exponent) of losses = factor * flops^-exponent, by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(flops_N), np.log(losses_N), 1)
    return float(np.exp(intercept)), float(-slope)


def fit_family(name: str, sizes: Sequence[tuple[float, Sequence[float]]], target: float) -> dict[str, Any]:
    """The power law of one family as JSON values, with 95 % intervals by the bootstrap. `sizes`: (training FLOPs, the
    final losses of all seeds) of each size. Raises UserError for less than two sizes."""
    if len({flops for flops, _ in sizes}) < 2:
        raise UserError(f"{name} has one size: a fit of loss against FLOPs needs two or more")
    flops_N = np.concatenate([np.full(len(losses), flops) for flops, losses in sizes])
    factor, exponent = fit_power_law(flops_N, np.concatenate([losses for _, losses in sizes]))
    rng = np.random.default_rng(0)
    fits = np.array(
        [
            fit_power_law(flops_N, np.concatenate([rng.choice(losses, len(losses)) for _, losses in sizes]))
            for _ in range(_RESAMPLES)
        ]
    )
    predicted_R = fits[:, 0] * target ** -fits[:, 1]
    return {
        "sizes": [{"flops": flops, "losses": list(losses)} for flops, losses in sizes],
        "factor": factor,
        "exponent": exponent,
        "exponent_interval": np.percentile(fits[:, 1], _INTERVAL).tolist(),
        "predicted_loss": factor * target**-exponent,
        "predicted_loss_interval": np.percentile(predicted_R, _INTERVAL).tolist(),
    }


def format_scaling(report: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: the exponents, and the predictions, which are called so."""
    head = f"| | exponent of the FLOPs | loss predicted for the training FLOPs of {report['target']} |"
    lines = ["", "Loss = factor x FLOPs^-exponent, with 95 % intervals by resampling seeds:", "", head, "|---|---|---|"]
    for name, fit in report["families"].items():
        low, high = fit["exponent_interval"]
        least, most = fit["predicted_loss_interval"]
        lines.append(
            f"| {name} | {fit['exponent']:.4f} ({low:.4f} to {high:.4f}) | "
            f"{fit['predicted_loss']:.3f} ({least:.3f} to {most:.3f}) |"
        )
    return [*lines, "", f"Note: {report['note']}."]


def _plot(families: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Points of all seeds and the fitted lines, on logarithmic axes."""
    figure, ((axes,),) = new_figure(1, width=6, height=4)
    for (name, fit), colour in zip(families.items(), COLOURS, strict=False):
        flops = [size["flops"] for size in fit["sizes"] for _ in size["losses"]]
        losses = [loss for size in fit["sizes"] for loss in size["losses"]]
        axes.plot(flops, losses, "o", color=colour, markersize=4, fillstyle="none")
        ends = [min(flops), max(flops)]
        line = [fit["factor"] * x ** -fit["exponent"] for x in ends]
        axes.plot(ends, line, color=colour, label=f"{name}: exponent {fit['exponent']:.4f}")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    save_figure(figure, path)
