"""Features of the scales: how a block's outputs differ between the tokens of different scales (MEPA, Fig. 1a).

Letters: B images, N tokens of one scale, P points (tokens), D width, K scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.errors import UserError
from nextscale.common.extras import import_extra
from nextscale.common.files import write_json
from nextscale.common.precision import widen
from nextscale.common.rng import fold_seed, make_generator
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.analyzed_model import AnalyzedModel, describe_analysis, open_models
from nextscale.research.analysis.figures import plot_points

Projection = Literal["pca", "tsne"]


def analyse_features(
    models: Sequence[str],
    data: str,
    out: Path,
    config: AnalysisConfig | None = None,
    names: Sequence[str] = (),
    *,
    block: int = 0,
    points: int = 256,
    projection: Projection = "pca",
) -> dict[str, Any]:
    """Features of a block on held-out images of `data`, by scale; writes features.json and features.png into `out`.

    `block`: counted from 1; 0 = the middle one, depth // 2. `points`: number of tokens of each scale, drawn with the
    seed, that are projected to two dimensions and plotted; the measures of separation use all tokens. Returns the
    content of features.json. Raises UserError for a block that does not exist, or for data that is not the model's.
    """
    config = config or AnalysisConfig()
    if points < 1 or projection not in ("pca", "tsne"):
        raise UserError(f"points must be 1 or more and projection pca or tsne; got {points} and '{projection}'")
    reports, panels = [], {}
    for analyzed in open_models(models, names, data, config):
        number = analyzed.check_block(block, len(analyzed.model.blocks) // 2)
        moments, tokens = _collect_features(analyzed, number, points)
        report = {
            "name": analyzed.name, "images": len(analyzed.rows), "block": number, "scales": analyzed.scales,
            **compute_separation(moments), **_project_tokens(tokens, projection, config.seed),
        }  # fmt: skip
        reports.append(report)
        title = f"{analyzed.name}, block {number}\n{report['variance_between_scales']:.0%} of the variance is between"
        panels[f"{title} scales"] = (_name_axes(report), dict(zip(analyzed.scales, report["points"], strict=True)))
    report = {"analysis": "features", **describe_analysis(data, config, find_device(config.device)), "models": reports}
    write_json(out / "features.json", report)
    plot_points(panels, out / "features.png")
    return report


class ScaleMoments:
    """Count, sum and sum of squared norms of the features of one scale, float64 where the device has it."""

    def __init__(self) -> None:
        self.count, self.sum_D, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x_PD: Tensor) -> None:
        """Add the features of more tokens."""
        x_PD = widen(x_PD)
        self.count += len(x_PD)
        self.sum_D, self.squares = self.sum_D.to(x_PD) + x_PD.sum(dim=0), self.squares.to(x_PD) + (x_PD**2).sum()

    @property
    def mean_D(self) -> Tensor:
        return self.sum_D / self.count

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean."""
        return max(float(self.squares / self.count - (self.mean_D**2).sum()), 0.0)


def compute_separation(moments: Sequence[ScaleMoments]) -> dict[str, Any]:
    """How far the scales lie apart, with equal weight for each scale.

    `variance_between_scales`: the share of the variance that is between the scales' means, 0 to 1. `spread_per_scale`:
    root mean squared distance from a scale's mean. `distance_between_scales`: (K, K), between the means.
    """
    mean_KD = torch.stack([m.mean_D for m in moments])
    between = float(((mean_KD - mean_KD.mean(dim=0)) ** 2).sum(dim=1).mean())
    within = sum(m.variance for m in moments) / len(moments)
    distance_KK = (mean_KD[:, None] - mean_KD[None]).norm(dim=-1)
    return {
        "variance_between_scales": between / max(between + within, 1e-300),
        "spread_per_scale": [m.variance**0.5 for m in moments],
        "distance_between_scales": distance_KK.tolist(),
    }


def _collect_features(analyzed: AnalyzedModel, block: int, points: int) -> tuple[list[ScaleMoments], list[Tensor]]:
    """For each scale the moments of all tokens, and the features (P, D), float64 on the CPU, of `points` tokens."""
    pyramid, images = analyzed.model.pyramid, len(analyzed.rows)
    moments = [ScaleMoments() for _ in pyramid.sides]
    tokens: list[list[Tensor]] = [[] for _ in pyramid.sides]
    drawn = []
    for k, count in enumerate(pyramid.counts):
        rng = make_generator(analyzed.config.seed, "features", k)
        drawn.append(torch.randperm(images * count, generator=rng)[:points].sort().values)
    for start, x_BLD in _run_block(analyzed, block):
        for k, ((first, last), count) in enumerate(zip(pyramid.spans, pyramid.counts, strict=True)):
            x_PD = x_BLD[:, first:last].flatten(0, 1)
            moments[k].add(x_PD)
            index = drawn[k] - start * count
            index = index[(index >= 0) & (index < len(x_PD))]
            tokens[k].append(x_PD[index.to(x_PD.device)].cpu().double())
    return moments, [torch.cat(batches) for batches in tokens]


def _run_block(analyzed: AnalyzedModel, block: int) -> Iterator[tuple[int, Tensor]]:
    """For each batch the number of its first image, and the block's output (B, L, D)."""
    start = 0
    for output in analyzed.run_batches(hidden=block):
        assert output.hidden_BND is not None, "`hidden` requests it"
        yield start, output.hidden_BND
        start += len(output.hidden_BND)


def _project_tokens(tokens: list[Tensor], projection: Projection, seed: int) -> dict[str, Any]:
    """The tokens of each scale in two dimensions, and for PCA the share of the variance along each axis."""
    x_PD = torch.cat(tokens)
    xy_P2, shares = project_principal(x_PD)
    if projection == "tsne":
        xy_P2 = _project_tsne(x_PD, seed)
    scales = xy_P2.split([len(scale) for scale in tokens])
    points = [[[float(f"{value:.5g}") for value in point] for point in scale.tolist()] for scale in scales]
    return {"projection": projection, "variance_of_axes": shares if projection == "pca" else [], "points": points}


def project_principal(x_PD: Tensor, axes: int = 2) -> tuple[Tensor, list[float]]:
    """Points on their first principal axes (P, axes), and the share of the variance along each.

    The sign of an axis is chosen so that its largest component is positive; the same data gives the same plot.
    """
    centred_PD = x_PD - x_PD.mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(centred_PD.T @ centred_PD)
    axes_DA = vectors_DD[:, -axes:].flip(1)
    axes_DA = axes_DA * axes_DA.gather(0, axes_DA.abs().argmax(dim=0, keepdim=True)).sign()
    shares = values_D[-axes:].flip(0).clamp_min(0) / values_D.clamp_min(0).sum().clamp_min(1e-300)
    return centred_PD @ axes_DA, shares.tolist()


def _project_tsne(x_PD: Tensor, seed: int) -> Tensor:
    manifold = import_extra("sklearn.manifold", "t-SNE")
    if len(x_PD) < 4:
        raise UserError(f"t-SNE needs at least 4 tokens; got {len(x_PD)}: raise --num")
    tsne = manifold.TSNE(
        init="pca", perplexity=min(30.0, (len(x_PD) - 1) / 3), random_state=fold_seed(seed, "tsne") % 2**32
    )
    return torch.from_numpy(tsne.fit_transform(x_PD.numpy()))


def _name_axes(report: dict[str, Any]) -> tuple[str, str]:
    """The labels of the plot's axes."""
    if report["projection"] == "tsne":
        return "t-SNE 1", "t-SNE 2"
    x, y = report["variance_of_axes"]
    return f"principal axis 1 ({x:.0%})", f"principal axis 2 ({y:.0%})"
