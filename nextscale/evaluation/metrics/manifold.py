"""Improved precision and recall: the share of samples in the references' manifold, and the reverse."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import check_features

_ROWS = 1024
_ROUNDING = 1e-12


def precision_recall(sample_ND: Tensor, reference_MD: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall) of samples against references (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls around its points; each ball reaches the point's k-th nearest neighbour in
    the set. Precision: share of samples in the references' manifold; recall: share of references in the samples'
    manifold; 0 to 1. A point on the boundary is inside. Raises UserError when a set has too few points, or when the
    widths differ.
    """
    check_features(sample_ND, "samples")
    check_features(reference_MD, "references")
    if sample_ND.shape[1] != reference_MD.shape[1]:
        raise UserError(f"features of {sample_ND.shape[1]} and {reference_MD.shape[1]} channels cannot be compared")
    if min(len(sample_ND), len(reference_MD)) <= neighbours:
        raise UserError(f"precision and recall with k = {neighbours} need at least {neighbours + 1} images in each set")
    centre = reference_MD.double().mean(dim=0)  # centred features lose fewer digits in the differences below
    samples, references = sample_ND.double() - centre, reference_MD.double() - centre
    return (
        _compute_share_inside(samples, references, _compute_radii(references, neighbours)),
        _compute_share_inside(references, samples, _compute_radii(samples, neighbours)),
    )


def _compute_radii(points_ND: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest neighbour, the point itself excluded."""
    radii = [
        _squared_distances(rows, points_ND)[0].kthvalue(neighbours + 1, dim=1).values for rows in points_ND.split(_ROWS)
    ]
    return torch.cat(radii)


def _compute_share_inside(points_ND: Tensor, centres_MD: Tensor, radii_M: Tensor) -> float:
    inside = []
    for rows in points_ND.split(_ROWS):
        squared, rounding = _squared_distances(rows, centres_MD)
        inside.append((squared <= radii_M + rounding).any(dim=1))
    return float(torch.cat(inside).double().mean())


def _squared_distances(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (N, M) from one matrix product, and a bound of their rounding errors."""
    sizes = a_ND.square().sum(dim=1)[:, None] + b_MD.square().sum(dim=1)
    return sizes - 2 * a_ND @ b_MD.T, sizes * _ROUNDING
