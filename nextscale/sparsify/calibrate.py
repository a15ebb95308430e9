"""Thresholds for a compute target: what each threshold costs and saves on held-out images, and the best choice.

Teacher-forced: the model sees the tokens of real images, with their labels and without, as guidance does. The dense
model is the same one with all experts. The loss in quality is measured as the KL divergence of a token's predicted
distribution from the dense model's.

Letters: B images, L tokens, V codes, K scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nextscale.config.feed_forward import Selection
from nextscale.config.model import ModelConfig
from nextscale.info import condition_flops
from nextscale.sampling.thresholds import Budget
from nextscale.sparsify.flops import dense_flops, of_scale, step_flops
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.feed_forward.records import Activity, recorded
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.var import VAR

GRID = (1.0, 0.99, 0.97, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.35, 0.2, 0.0)
"""Thresholds that are tried at all sparse scales at once."""
_FINE = 0.005


@dataclass(frozen=True)
class Point:
    """What some thresholds do, per scale; means over sequences."""

    flops_K: tuple[float, ...]
    """Of a sequence."""
    kl_K: tuple[float, ...]
    """Divergence from the dense model in nats, summed over the scale's tokens."""
    nats_K: tuple[float, ...]
    """Cross-entropy per token, given the label."""
    agreement_K: tuple[float, ...]
    """Share of tokens whose likeliest code is the dense model's."""
    active_K: tuple[float, ...]
    """Share of the hidden units that ran."""

    def share(self, config: ModelConfig) -> float:
        """FLOPs over those of the dense model, of an image."""
        assert config.transformer is not None, "a generator has a transformer"
        return (condition_flops(config.transformer) + sum(self.flops_K)) / dense_flops(config, 1)


@torch.no_grad()
def measure(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Iterable[tuple[Tensor, Tensor]],
    candidates: Sequence[Thresholds],
) -> list[Point]:  # fmt: skip
    """What each of the candidates does on batches of (labels (B,), tokens (B, L))."""
    sums, images = [torch.zeros(5, len(config.pyramid), dtype=torch.float64) for _ in candidates], 0
    batches = list(batches)
    for labels_B, tokens_BL in tqdm(batches, desc=f"measuring {len(candidates)} thresholds", unit="batch"):
        values = model.condition.with_none(labels_B)
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL).repeat(2, 1, 1)
        dense_BLV = model(values, inputs_BLC).logits_BNV.log_softmax(dim=-1)
        images += len(labels_B)
        for total, thresholds in zip(sums, candidates, strict=True):
            output = model(values, inputs_BLC, thresholds=thresholds)
            here_BLV = output.logits_BNV.log_softmax(dim=-1)
            kl_BL = F.kl_div(here_BLV, dense_BLV, reduction="none", log_target=True).sum(dim=-1)
            agree_BL = (here_BLV.argmax(dim=-1) == dense_BLV.argmax(dim=-1)).double()
            nats_BL = -here_BLV[: len(labels_B)].gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
            for k, span in enumerate(config.pyramid.spans):
                part = slice(*span)
                ran = [of_scale(activity, span) for activity in recorded(output.records, Activity)]
                active = torch.stack([a.share_BN(model.config.ffn_width).mean() for a in ran]).mean()
                total[:, k] += torch.tensor([
                    step_flops(config, k, [ran], len(values)) / 2,
                    float(kl_BL[:, part].double().sum()) / 2,
                    float(nats_BL[:, part].double().mean()) * len(labels_B),
                    float(agree_BL[:, part].mean()) * len(labels_B),
                    float(active) * len(labels_B),
                ], dtype=torch.float64)  # fmt: skip
    return [Point(*(tuple(row.tolist()) for row in total / images)) for total in sums]


def sweep(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Sequence[tuple[Tensor, Tensor]],
    grid: Sequence[float] = GRID, selection: Selection = "threshold",
) -> list[Point]:  # fmt: skip
    """What each threshold of the grid does, at all sparse scales at once."""
    scales = len(config.pyramid)
    candidates = [Thresholds.create(model.config, scales, (tau,), selection) for tau in grid]
    return measure(config, tokenizer, model, batches, candidates)


def allot(
    config: ModelConfig, grid: Sequence[float], points: Sequence[Point], shares: Sequence[float]
) -> list[tuple[float, ...]]:
    """Thresholds of the sparse scales for each share of the dense FLOPs, with the least divergence by the curves.

    `grid` falls from 1, `points` are its `sweep`. It starts with all experts. Then the scale whose next
    step saves most for its divergence takes it (on the lower convex hull of each curve, so that no cheap step hides
    behind a dear one). A share that cannot be reached gets the lowest thresholds.
    """
    assert config.transformer is not None, "a generator has a transformer"
    K = len(config.pyramid)
    first = K - min(config.transformer.dynamic.scales, K)
    curves = [_curve(grid, points, k) for k in range(first, K)]
    place = [0] * len(curves)
    dense = dense_flops(config, 1)
    total = condition_flops(config.transformer) + sum(points[0].flops_K)
    found: dict[float, tuple[float, ...]] = {}
    for share in sorted(shares, reverse=True):
        while total > share * dense:
            steps = [
                ((c[i + 1][2] - c[i][2]) / (c[i][1] - c[i + 1][1]), n)
                for n, (c, i) in enumerate(zip(curves, place, strict=True)) if i + 1 < len(c)
            ]  # fmt: skip
            if not steps:
                break
            n = min(steps)[1]
            total -= curves[n][place[n]][1] - curves[n][place[n] + 1][1]
            place[n] += 1
        found[share] = tuple(c[i][0] for c, i in zip(curves, place, strict=True))
    return [found[share] for share in shares]


def _curve(grid: Sequence[float], points: Sequence[Point], k: int) -> list[tuple[float, float, float]]:
    """(threshold, FLOPs, KL divergence) of scale k in fine steps along the lower convex hull, FLOPs falling."""
    hull: list[tuple[float, float, float]] = []
    for tau, point in zip(grid, points, strict=True):
        new = (tau, point.flops_K[k], point.kl_K[k])
        if hull and new[1] >= hull[-1][1]:
            continue  # a router that saves less than it costs
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], new):
            hull.pop()
        hull.append(new)
    fine = hull[:1]
    for a, b in pairwise(hull):
        steps = max(1, round((a[0] - b[0]) / _FINE))
        fine += [tuple(x + (y - x) * i / steps for x, y in zip(a, b, strict=True)) for i in range(1, steps + 1)]  # type: ignore[misc]
    return fine


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return (b[2] - a[2]) / (a[1] - b[1])


def calibrate(
    config: ModelConfig, tokenizer: Tokenizer, model: VAR, batches: Sequence[tuple[Tensor, Tensor]],
    shares: Sequence[float], selection: Selection = "threshold", corrections: int = 2,
) -> tuple[list[Budget], list[Point], list[Point]]:  # fmt: skip
    """(table, points of the grid, points of the table below its first line): thresholds for these shares, verified.

    The curves of single scales do not add up to the last digit, as a sparse scale changes what later ones see; so the
    thresholds are measured together and the targets corrected by what was missed. The table's shares are the measured
    ones.
    """
    points = sweep(config, tokenizer, model, batches, GRID, selection)
    scales, targets = len(config.pyramid), list(shares)
    for turn in range(corrections + 1):
        taus = allot(config, GRID, points, targets)
        verified = measure(
            config, tokenizer, model, batches, [Thresholds.create(model.config, scales, t, selection) for t in taus]
        )
        if turn < corrections:
            missed = [want - point.share(config) for want, point in zip(shares, verified, strict=True)]
            targets = [target + miss for target, miss in zip(targets, missed, strict=True)]
    rows: dict[float, tuple[Budget, Point]] = {}
    for tau, point in zip(taus, verified, strict=True):
        share = point.share(config)
        if share < 1:
            rows.setdefault(round(share, 6), (Budget(share, tau), point))
    ones = (1.0,) * min(model.config.dynamic.scales, scales)
    return [Budget(1.0, ones), *(row for row, _ in rows.values())], points, [point for _, point in rows.values()]
