"""The report of `nextscale sparsify`: rows of sparsify.json, sparsify.png, and a summary as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.common.plots import can_plot, plot_curves
from nextscale.config.model import ModelConfig
from nextscale.sparsify.calibrate import GRID, Calibration, Measurement


def list_grid(config: ModelConfig, calibration: Calibration) -> list[dict[str, Any]]:
    """A row for each threshold of the grid, which all sparse scales share."""
    return [_make_row(config, (tau,), m) for tau, m in zip(GRID, calibration.grid, strict=True)]


def list_table(config: ModelConfig, calibration: Calibration) -> list[dict[str, Any]]:
    """A row for each line of the calibrated table below the first, which is all experts."""
    lines = zip(calibration.table[1:], calibration.measurements, strict=True)
    return [_make_row(config, budget.tau, measurement) for budget, measurement in lines]


def _make_row(config: ModelConfig, tau: Sequence[float], measurement: Measurement) -> dict[str, Any]:
    counts = config.pyramid.counts
    nats = sum(n * count for n, count in zip(measurement.nats_K, counts, strict=True)) / sum(counts)
    return {
        "tau": list(tau), "share": measurement.share(config), "nats_per_token": nats,
        "kl_per_token": sum(measurement.kl_K) / sum(counts), "kl_per_scale": list(measurement.kl_K),
        "active_per_scale": list(measurement.active_K), "agreement_per_scale": list(measurement.agreement_K),
    }  # fmt: skip


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Plot what a smaller share of the FLOPs costs, with one threshold for all scales and with one for each."""
    thresholds = report["stages"].get("thresholds")
    if not thresholds or not can_plot():
        return
    panels: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    for name, title in (("kl_per_token", "KL divergence, nats per token"), ("nats_per_token", "cross-entropy")):
        panels[title] = {
            line: [(100 * row["share"], row[name]) for row in sorted(thresholds[rows], key=lambda row: row["share"])]
            for line, rows in (("one threshold", "grid"), ("a threshold per scale", "table"))
        }
    plot_curves(panels, path, x_name="% of the dense model's FLOPs")


def summarize_report(report: dict[str, Any], out: Path) -> str:
    """The report as text, with the command to try next."""
    lines, stages = [f"done: {out}"], report["stages"]
    if "validation_loss" in stages.get("tune", {}):
        tuned = stages["tune"]
        lines.append(
            f"tuned: held-out cross-entropy {tuned['validation_loss']:.3f} nats per token, "
            f"{tuned['validation_zeros']:.1%} of the hidden units are 0"
        )
    if "adapt" in stages:
        lines.append(
            f"adapted: held-out cross-entropy {stages['adapt']['validation_loss']:.3f} with the selected experts only"
        )
    if "split" in stages:
        lines.append("{experts} experts of {expert_size}, at the last {sparse_scales} scales".format(**stages["split"]))
    if "routers" in stages:
        routers = stages["routers"]
        lines.append(
            f"routers: relative squared error {routers['validation_relative_error']:.3f}, "
            f"{routers['validation_recall']:.1%} of each token's larger half of experts found"
        )
    if "thresholds" in stages:
        thresholds = stages["thresholds"]
        lines.append(f"thresholds, on {thresholds['images']} held-out images ({thresholds['calibrated_on']}):")
        lines.append("  FLOPs    divergence   cross-entropy   tau")
        for row in thresholds["table"]:
            taus = ",".join(f"{t:.4f}" for t in row["tau"])
            lines.append(f"  {row['share']:>6.1%}{row['kl_per_token']:>12.4f}{row['nats_per_token']:>15.3f}   {taus}")
        budget = thresholds["budget"] or 0.8
        lines.append(f"try it: nextscale sample {out} --labels 0 --budget {budget:g} --out grid.png")
    return "\n".join(lines)
