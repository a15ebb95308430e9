"""Improved precision and recall: what share of one set lies in the other's manifold, and the other way round."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import check_features

_ROWS = 1024
_ROUNDING = 1e-12


def precision_recall(sample_ND: Tensor, reference_MD: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall) of samples against references (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is a ball around each of its points that reaches its k-th nearest neighbour in the set. Precision:
    share of samples inside a ball of the references; recall: share of references inside a ball of the samples; 0 to 1.
    A point on the rim is inside. UserError when a set has no k-th neighbour, or the sets have different widths.
    """
    check_features(sample_ND, "samples")
    check_features(reference_MD, "references")
    if sample_ND.shape[1] != reference_MD.shape[1]:
        raise UserError(f"features of {sample_ND.shape[1]} and {reference_MD.shape[1]} channels cannot be compared")
    if min(len(sample_ND), len(reference_MD)) <= neighbours:
        raise UserError(f"precision and recall with k = {neighbours} need at least {neighbours + 1} images in each set")
    centre = reference_MD.double().mean(dim=0)  # near 0 the differences below lose fewer digits
    samples, references = sample_ND.double() - centre, reference_MD.double() - centre
    return (
        _share_inside(samples, references, _radii(references, neighbours)),
        _share_inside(references, samples, _radii(samples, neighbours)),
    )


def _radii(points_ND: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th neighbour; the point itself is not counted."""
    parts = [
        _squared_distances(rows, points_ND)[0].kthvalue(neighbours + 1, dim=1).values for rows in points_ND.split(_ROWS)
    ]
    return torch.cat(parts)


def _share_inside(points_ND: Tensor, centres_MD: Tensor, radii_M: Tensor) -> float:
    inside = []
    for rows in points_ND.split(_ROWS):
        squared, rounding = _squared_distances(rows, centres_MD)
        inside.append((squared <= radii_M + rounding).any(dim=1))
    return float(torch.cat(inside).double().mean())


def _squared_distances(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) by one matrix product, and how much of each rounding can explain: equal points are that near."""
    sizes = a_ND.square().sum(dim=1)[:, None] + b_MD.square().sum(dim=1)
    return sizes - 2 * a_ND @ b_MD.T, sizes * _ROUNDING
