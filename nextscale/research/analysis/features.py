"""Features of the scales: where a block's output lies for tokens of each scale (MEPA, Fig. 1a).

Letters: B images, N tokens of one scale, P chosen tokens, D width, K scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.rng import fold_seed, make_generator
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.figures import clouds
from nextscale.research.analysis.subject import Subject, about, subjects

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

    `block`: counted from 1; 0 = the middle one, depth // 2. `points`: tokens of each scale that are projected to two
    dimensions and drawn, chosen from the seed; the figures of separation are of all tokens. Returns what features.json
    holds. Raises UserError for a block that is not there, or data that is not the model's.
    """
    config = config or AnalysisConfig()
    if points < 1 or projection not in ("pca", "tsne"):
        raise UserError(f"points must be 1 or more and projection pca or tsne; got {points} and '{projection}'")
    found, pictures = [], {}
    for subject in subjects(models, names, data, config):
        number = subject.block(block, len(subject.model.blocks) // 2)
        moments, chosen = _collect(subject, number, points)
        report = {
            "name": subject.name, "images": len(subject.rows), "block": number, "scales": subject.scales,
            **separation(moments), **_projected(chosen, projection, config.seed),
        }  # fmt: skip
        found.append(report)
        title = f"{subject.name}, block {number}\n{report['variance_between_scales']:.0%} of the variance is between"
        pictures[f"{title} scales"] = (_axes(report), dict(zip(subject.scales, report["points"], strict=True)))
    report = {"analysis": "features", **about(data, config, torch.device(config.device)), "models": found}
    write_json(out / "features.json", report)
    clouds(pictures, out / "features.png")
    return report


class Moments:
    """Count, sum and sum of squared norms of the features of one scale, float64."""

    def __init__(self) -> None:
        self.count, self.sum_D, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x_PD: Tensor) -> None:
        """Take in more tokens."""
        x_PD = x_PD.double()
        self.count += len(x_PD)
        self.sum_D, self.squares = self.sum_D.to(x_PD) + x_PD.sum(dim=0), self.squares.to(x_PD) + (x_PD**2).sum()

    @property
    def mean_D(self) -> Tensor:
        return self.sum_D / self.count

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean."""
        return max(float(self.squares / self.count - (self.mean_D**2).sum()), 0.0)


def separation(moments: Sequence[Moments]) -> dict[str, Any]:
    """How far the scales lie apart, each scale counting the same.

    `variance_between_scales`: that of the scales' means over the whole, in 0 to 1. `spread_per_scale`: root mean
    squared distance from a scale's mean. `distance_between_scales`: (K, K), between the means.
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


def _collect(subject: Subject, block: int, points: int) -> tuple[list[Moments], list[Tensor]]:
    """Of each scale the moments of all tokens, and the features (P, D), float64 on the CPU, of `points` of them."""
    pyramid, images = subject.model.pyramid, len(subject.rows)
    moments = [Moments() for _ in pyramid.sides]
    chosen: list[list[Tensor]] = [[] for _ in pyramid.sides]
    picks = [
        torch.randperm(images * count, generator=make_generator(subject.config.seed, "features", k))[:points]
        .sort()
        .values
        for k, count in enumerate(pyramid.counts)
    ]
    for start, x_BLD in _features(subject, block):
        for k, ((first, last), count) in enumerate(zip(pyramid.spans, pyramid.counts, strict=True)):
            x_PD = x_BLD[:, first:last].flatten(0, 1)
            moments[k].add(x_PD)
            here = picks[k] - start * count
            here = here[(here >= 0) & (here < len(x_PD))]
            chosen[k].append(x_PD[here.to(x_PD.device)].double().cpu())
    return moments, [torch.cat(parts) for parts in chosen]


def _features(subject: Subject, block: int) -> Iterator[tuple[int, Tensor]]:
    """The number of a batch's first image, and the block's output (B, L, D)."""
    start = 0
    for output in subject.outputs(hidden=block):
        assert output.hidden_BND is not None, "it was asked for"
        yield start, output.hidden_BND
        start += len(output.hidden_BND)


def _projected(chosen: list[Tensor], projection: Projection, seed: int) -> dict[str, Any]:
    """The chosen tokens of each scale in two dimensions, and for PCA the share of the variance along each."""
    x_PD = torch.cat(chosen)
    xy_P2, shares = principal(x_PD)
    if projection == "tsne":
        xy_P2 = _tsne(x_PD, seed)
    parts = xy_P2.split([len(part) for part in chosen])
    points = [[[float(f"{value:.5g}") for value in point] for point in part.tolist()] for part in parts]
    return {"projection": projection, "variance_of_axes": shares if projection == "pca" else [], "points": points}


def principal(x_PD: Tensor) -> tuple[Tensor, list[float]]:
    """Points on their first two principal axes (P, 2), and the share of the variance along each.

    An axis points to where its largest component is positive, so that the same data gives the same picture.
    """
    centred_PD = x_PD - x_PD.mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(centred_PD.T @ centred_PD)
    axes_D2 = vectors_DD[:, -2:].flip(1)
    axes_D2 = axes_D2 * axes_D2.gather(0, axes_D2.abs().argmax(dim=0, keepdim=True)).sign()
    shares = values_D[-2:].flip(0).clamp_min(0) / values_D.clamp_min(0).sum().clamp_min(1e-300)
    return centred_PD @ axes_D2, shares.tolist()


def _tsne(x_PD: Tensor, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("t-SNE comes with scikit-learn: pip install 'nextscale[quickstart]'") from None
    if len(x_PD) < 4:
        raise UserError(f"t-SNE needs at least 4 tokens; got {len(x_PD)}: show the model more images")
    tsne = TSNE(init="pca", perplexity=min(30.0, (len(x_PD) - 1) / 3), random_state=fold_seed(seed, "tsne") % 2**32)
    return torch.from_numpy(tsne.fit_transform(x_PD.numpy()))


def _axes(report: dict[str, Any]) -> tuple[str, str]:
    """What the picture's axes are called."""
    if report["projection"] == "tsne":
        return "t-SNE 1", "t-SNE 2"
    x, y = report["variance_of_axes"]
    return f"principal axis 1 ({x:.0%})", f"principal axis 2 ({y:.0%})"
