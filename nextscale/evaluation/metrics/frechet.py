"""Fréchet distance between Gaussians fitted to two sets of features: FID, sFID, FD-DINOv2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nextscale.common.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean_D: Tensor
    covariance_DD: Tensor
    root_ND: Tensor | None = None
    """With root^T root = the covariance, where there are fewer images than channels."""

    @classmethod
    def compute(cls, features_ND: Tensor, where: str) -> Moments:
        """The moments of features (N, D), N of 2 or more; the covariance divides by N - 1.

        `where` names the features in errors. Raises UserError when a value is not finite or there are too few rows.
        """
        check_features(features_ND, where)
        if len(features_ND) < 2:
            raise UserError(f"{where}: a covariance needs at least 2 images; got {len(features_ND)}")
        features = features_ND.double()
        mean_D = features.mean(dim=0)
        root_ND = (features - mean_D) / (len(features) - 1) ** 0.5
        return cls(mean_D, root_ND.T @ root_ND, root_ND if len(root_ND) < len(mean_D) else None)

    @cached_property
    def factor_DR(self) -> Tensor:
        """F (D, R) with F F^T = the covariance, of rank R or, with `root_ND`, of at most rank R.

        Eigenvalues within rounding of 0 count as 0: their roots would not be small.
        """
        if self.root_ND is not None:
            return self.root_ND.T
        values, vectors = torch.linalg.eigh(self.covariance_DD)
        kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, kept] * values[kept].sqrt()


def check_features(features_ND: Tensor, where: str) -> None:
    """Raise UserError when features are not a matrix (N, D) or not finite, naming the first bad row."""
    if features_ND.ndim != 2 or 0 in features_ND.shape:
        raise UserError(f"{where}: features must be (images, channels); got {tuple(features_ND.shape)}")
    broken = (~features_ND.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        raise UserError(f"{where}: the features of {len(broken)} images are not finite, first image {int(broken[0])}")


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2) (Heusel et al. 2017, arXiv 1706.08500, Eq. 6), float64.

    The last trace is computed as the sum of the singular values of F1^T F2, where S = F F^T, which loses half as many
    digits as the square roots of the eigenvalues of a product. With fewer images than channels a covariance is
    singular; the distance is still defined, but biased upwards. Raises UserError when the widths differ.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise UserError(f"features of {len(a.mean_D)} and {len(b.mean_D)} channels cannot be compared")
    trace = torch.linalg.svdvals(a.factor_DR.T @ b.factor_DR).sum()
    distance = (a.mean_D - b.mean_D).square().sum() + a.covariance_DD.trace() + b.covariance_DD.trace() - 2 * trace
    return max(0.0, float(distance))


def compute_influence(features_ND: Tensor, moments: Moments, other: Moments) -> Tensor:
    """How much each row weighs in `frechet_distance(moments, other)`: (N,), float64, mean 0.

    The derivative of the distance for the weight of one row, times N: 2 (m1 - m2)^T z + z^T (I - T) z - tr((I - T) S1),
    where z = row - m1 and T = F2 (F2^T S1 F2)^-1/2 F2^T is the linear map that carries the first Gaussian to the
    second. The variance of these numbers over N estimates that of the distance (infinitesimal jackknife; Jaeckel 1972,
    Efron 1982). `moments`: of these features. Directions without variance count as fixed. tests/test_metrics.py
    compares with leaving out one row at a time.
    """
    z_ND, factor_DR = features_ND.double() - moments.mean_D, other.factor_DR
    _, singular, right_RR = torch.linalg.svd(moments.factor_DR.T @ factor_DR, full_matrices=False)
    kept = singular > singular[0] * len(factor_DR) * torch.finfo(singular.dtype).eps
    root_DR = factor_DR @ right_RR[kept].T / singular[kept].sqrt()
    square_N = z_ND.square().sum(dim=1) - (z_ND @ root_DR).square().sum(dim=1)
    return 2 * z_ND @ (moments.mean_D - other.mean_D) + square_N - square_N.mean()
