"""How much worse one setting's Fréchet distance is than another's, from pairs of images of equal random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import Moments, compute_influence, frechet_distance

_ZERO = 1e-9
"""A distance below this share of the reference's variance is rounding."""


@dataclass(frozen=True)
class PairedLoss:
    """The distance of a setting relative to that of the baseline."""

    distance: float
    baseline: float
    """The baseline's distance, of as many images."""
    error: float
    """Standard error of `loss`."""
    images: int

    @property
    def loss(self) -> float:
        """Share by which the distance is larger than the baseline's; below 0 it is smaller."""
        return self.distance / self.baseline - 1

    def bound(self, confidence: float = 0.95) -> float:
        """Upper bound of the loss: it is below with this probability (normal approximation)."""
        return self.loss + NormalDist().inv_cdf(confidence) * self.error


def compare_distances(features_ND: Tensor, baseline_ND: Tensor, reference_MD: Tensor) -> PairedLoss:
    """The loss of `features_ND` relative to `baseline_ND`, whose row i is of the same label and random numbers.

    The standard error is that of the ratio of the two distances over pairs of images, and over images of the reference,
    by the infinitesimal jackknife (see `compute_influence`): what both distances have in common cancels out. UserError
    when the numbers of rows differ, features are not finite, or the baseline's distance is 0.
    """
    if len(features_ND) != len(baseline_ND):
        raise UserError(f"pairs of images are compared; got {len(features_ND)} and {len(baseline_ND)} images")
    reference = Moments.compute(reference_MD, "the reference")
    moments, base = Moments.compute(features_ND, "the setting"), Moments.compute(baseline_ND, "the baseline")
    distance, dense = frechet_distance(moments, reference), frechet_distance(base, reference)
    if dense <= _ZERO * float(reference.covariance_DD.trace()):
        raise UserError("the baseline has a Fréchet distance of 0: a share of it means nothing")
    ratio, variance = distance / dense, 0.0
    parts = (
        (compute_influence(features_ND, moments, reference), compute_influence(baseline_ND, base, reference)),
        (compute_influence(reference_MD, reference, moments), compute_influence(reference_MD, reference, base)),
    )
    for own_N, other_N in parts:
        variance += float(((own_N - ratio * other_N) / dense).var() / len(own_N))
    return PairedLoss(distance, dense, math.sqrt(variance), len(features_ND))
