"""Thresholds for a compute target: measure what each threshold costs on held-out images, then choose per scale.

Measured with teacher forcing: the model sees the tokens of real images, with their labels and without, as guidance
does. The dense model is the same one with all experts. The loss in quality is the KL divergence of a token's predicted
distribution from the dense model's.

Letters: B images, L tokens, V codes, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nextscale.common.precision import widen
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import Selection
from nextscale.evaluation.flops import count_dense_flops, count_step_flops
from nextscale.info import condition_flops
from nextscale.sampling.thresholds import Budget
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.var import VAR, Output

GRID = (1.0, 0.99, 0.97, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.35, 0.2, 0.0)
"""Thresholds that are measured, each at all sparse scales at once."""
_CURVE_STEP = 0.005
"""Distance of the thresholds between which `choose_thresholds` chooses."""

Batches = Sequence[tuple[Any, Tensor]]
"""(condition values, tokens (B, L)) of held-out images."""


@dataclass(frozen=True)
class Measurement:
    """What some thresholds do, per scale; means over sequences."""

    flops_K: tuple[float, ...]
    """Of a sequence."""
    kl_K: tuple[float, ...]
    """KL divergence from the dense model in nats, summed over the scale's tokens."""
    nats_K: tuple[float, ...]
    """Cross-entropy per token, given the label."""
    agreement_K: tuple[float, ...]
    """Share of tokens whose likeliest code is the dense model's."""
    active_K: tuple[float, ...]
    """Share of the hidden units that ran."""

    def share(self, config: ModelConfig) -> float:
        """FLOPs over those of the dense model, of an image."""
        assert config.transformer is not None, "a generator has a transformer"
        return (condition_flops(config.transformer) + sum(self.flops_K)) / count_dense_flops(
            config, SampleConfig(cfg=0.0)
        )


@torch.no_grad()
def measure_thresholds(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Batches,
    candidates: Sequence[Thresholds],
) -> list[Measurement]:  # fmt: skip
    """One measurement for each of the candidates."""
    sums, images = [torch.zeros(5, len(config.pyramid), dtype=torch.float64) for _ in candidates], 0
    for given, tokens_BL in tqdm(batches, desc=f"measuring {len(candidates)} thresholds", unit="batch"):
        values = model.condition.add_unconditional(given)
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL).repeat(2, 1, 1)
        dense_BLV = model(values, inputs_BLC).logits_BNV.log_softmax(dim=-1)
        images += len(tokens_BL)
        for total, thresholds in zip(sums, candidates, strict=True):
            output = model(values, inputs_BLC, thresholds=thresholds)
            _add_measurement(total, config, output, dense_BLV, tokens_BL)
    return [Measurement(*(tuple(row.tolist()) for row in total / images)) for total in sums]


def _add_measurement(
    total_5K: Tensor, config: ModelConfig, output: Output, dense_BLV: Tensor, tokens_BL: Tensor
) -> None:
    """Add a batch's sums over images to the rows of `total_5K`, which are the fields of a `Measurement`.

    The output is of the images with their labels, then of the same images without; so there are 2 sequences an image.
    """
    assert config.transformer is not None, "a generator has a transformer"
    images, sequences = len(tokens_BL), len(dense_BLV)
    log_p_BLV = output.logits_BNV.log_softmax(dim=-1)
    kl_BL = F.kl_div(log_p_BLV, dense_BLV, reduction="none", log_target=True).sum(dim=-1)
    agree_BL = widen(log_p_BLV.argmax(dim=-1) == dense_BLV.argmax(dim=-1))
    nats_BL = -log_p_BLV[:images].gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    activities = collect(output.records, "activity")
    for k, span in enumerate(config.pyramid.spans):
        columns = slice(*span)
        at_scale = [activity.select(span) for activity in activities]
        active = torch.stack([a.share_BN(config.transformer.ffn_width).mean() for a in at_scale]).mean()
        total_5K[:, k] += torch.tensor([
            count_step_flops(config, k, at_scale, sequences) / 2,
            float(widen(kl_BL[:, columns]).sum()) / 2,
            float(widen(nats_BL[:, columns]).mean()) * images,
            float(agree_BL[:, columns].mean()) * images,
            float(active) * images,
        ], dtype=torch.float64)  # fmt: skip


def measure_grid(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Batches,
    grid: Sequence[float] = GRID, selection: Selection = "threshold",
) -> list[Measurement]:  # fmt: skip
    """One measurement for each threshold of the grid, which all sparse scales share."""
    scales = len(config.pyramid)
    candidates = [Thresholds.create(model.config, scales, (tau,), selection) for tau in grid]
    return measure_thresholds(config, tokenizer, model, batches, candidates)


def choose_thresholds(
    config: ModelConfig, grid: Sequence[float], measurements: Sequence[Measurement], shares: Sequence[float]
) -> list[tuple[float, ...]]:
    """Thresholds of the sparse scales for each share of the dense FLOPs, with the least divergence by the curves.

    `grid` falls from 1; `measurements` are those of `measure_grid`. The search starts with all experts. Then the scale
    whose next step on its curve saves most for its divergence takes that step, until the share is reached. A share that
    cannot be reached gets the lowest thresholds.
    """
    assert config.transformer is not None, "a generator has a transformer"
    K = len(config.pyramid)
    first = K - min(config.transformer.dynamic.scales, K)
    curves = [_trace_curve(grid, measurements, k) for k in range(first, K)]
    place = [0] * len(curves)
    dense = count_dense_flops(config, SampleConfig(cfg=0.0))
    total = condition_flops(config.transformer) + sum(measurements[0].flops_K)
    taus: dict[float, tuple[float, ...]] = {}
    for share in sorted(shares, reverse=True):
        while total > share * dense:
            steps = [
                (_compute_slope(curve[i], curve[i + 1]), n)
                for n, (curve, i) in enumerate(zip(curves, place, strict=True)) if i + 1 < len(curve)
            ]  # fmt: skip
            if not steps:
                break
            n = min(steps)[1]
            total -= curves[n][place[n]][1] - curves[n][place[n] + 1][1]
            place[n] += 1
        taus[share] = tuple(curve[i][0] for curve, i in zip(curves, place, strict=True))
    return [taus[share] for share in shares]


CurvePoint = tuple[float, float, float]
"""(threshold, FLOPs, KL divergence) of one scale."""


def _trace_curve(grid: Sequence[float], measurements: Sequence[Measurement], k: int) -> list[CurvePoint]:
    """The curve of scale k in fine steps along its lower convex hull, FLOPs falling.

    On the hull each step costs more divergence for what it saves than the one before, so the best next step of a scale
    is always its first.
    """
    hull: list[CurvePoint] = []
    for tau, measurement in zip(grid, measurements, strict=True):
        new = (tau, measurement.flops_K[k], measurement.kl_K[k])
        if hull and new[1] >= hull[-1][1]:
            continue  # a router that saves less than it costs
        while len(hull) > 1 and _compute_slope(hull[-2], hull[-1]) >= _compute_slope(hull[-2], new):
            hull.pop()
        hull.append(new)
    curve = hull[:1]
    for a, b in pairwise(hull):
        steps = max(1, round((a[0] - b[0]) / _CURVE_STEP))
        curve += [tuple(x + (y - x) * i / steps for x, y in zip(a, b, strict=True)) for i in range(1, steps + 1)]  # type: ignore[misc]
    return curve


def _compute_slope(a: CurvePoint, b: CurvePoint) -> float:
    """Divergence that is added for each FLOP that is saved."""
    return (b[2] - a[2]) / (a[1] - b[1])


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate_thresholds`."""

    table: list[Budget]
    """From all experts down; shares of the dense FLOPs as measured."""
    measurements: list[Measurement]
    """Of the table's lines below the first."""
    grid: list[Measurement]
    """Of the thresholds in `GRID`."""


def calibrate_thresholds(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Batches,
    shares: Sequence[float], selection: Selection = "threshold", corrections: int = 2,
) -> Calibration:  # fmt: skip
    """Thresholds for these shares of the dense FLOPs, measured together.

    The curves of single scales do not add up exactly, as a sparse scale changes what later ones see. So the thresholds
    of all scales are measured together, and the targets are corrected by the difference, `corrections` times.
    """
    grid = measure_grid(config, tokenizer, model, batches, GRID, selection)
    scales, targets = len(config.pyramid), list(shares)
    for turn in range(corrections + 1):
        taus = choose_thresholds(config, GRID, grid, targets)
        candidates = [Thresholds.create(model.config, scales, tau, selection) for tau in taus]
        measured = measure_thresholds(config, tokenizer, model, batches, candidates)
        if turn < corrections:
            errors = [share - m.share(config) for share, m in zip(shares, measured, strict=True)]
            targets = [target + error for target, error in zip(targets, errors, strict=True)]
    rows: dict[float, tuple[Budget, Measurement]] = {}
    for tau, measurement in zip(taus, measured, strict=True):
        share = measurement.share(config)
        if share < 1:
            rows.setdefault(round(share, 6), (Budget(share, tau), measurement))
    all_experts = Budget(1.0, (1.0,) * min(model.config.dynamic.scales, scales))
    return Calibration([all_experts, *(row for row, _ in rows.values())], [m for _, m in rows.values()], grid)
