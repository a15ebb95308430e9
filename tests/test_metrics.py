"""Metrics against formulas in NumPy and SciPy, torchmetrics, brute-force loops and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import Moments, frechet_distance
from nextscale.evaluation.metrics.manifold import precision_recall
from nextscale.evaluation.metrics.score import inception_score


def features(count, width, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / math.sqrt(width)
    return torch.from_numpy(rng.normal(size=(count, width)) @ mix + shift).float()


def distance(a, b):
    return frechet_distance(Moments.compute(a, "a"), Moments.compute(b, "b"))


# ---- Fréchet distance


@pytest.mark.parametrize(("counts", "width"), [((300, 250), 16), ((20, 400), 48), ((2, 3), 8)])
def test_frechet_distance_against_scipy(counts, width):
    """With enough images, and with fewer images than channels, where the covariance is singular."""
    a, b = features(counts[0], width, 0), features(counts[1], width, 1, shift=0.3)
    x, y = a.double().numpy(), b.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # the usual way round: a square root of the unsymmetric product, with ADM's small diagonal where it is singular
    jitter = np.eye(width) * (0 if min(counts) > width else 1e-9)
    root = scipy.linalg.sqrtm((s1 + jitter) @ (s2 + jitter)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-10 if min(counts) > width else 1e-3)


def test_frechet_distance_of_gaussians_in_closed_form():
    mean, covariance = torch.zeros(5).double(), torch.diag(torch.tensor([1.0, 4, 9, 16, 0])).double()
    moved = Moments(mean + 2, covariance)
    assert frechet_distance(Moments(mean, covariance), moved) == pytest.approx(5 * 4, abs=1e-9)
    wider = Moments(mean, covariance * 4)  # deviations double: the sum of squared differences of deviations
    assert frechet_distance(Moments(mean, covariance), wider) == pytest.approx(1 + 4 + 9 + 16, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = [Moments(m.mean_D @ turn.T, turn @ m.covariance_DD @ turn.T) for m in (Moments(mean, covariance), wider)]
    assert frechet_distance(*turned) == pytest.approx(30, abs=1e-9)


def test_frechet_distance_against_torchmetrics():
    """sFID is the same formula on other features; torchmetrics' takes whatever network it is given."""
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Eye(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    metric = fid.FrechetInceptionDistance(feature=Eye(), input_img_size=(1, 4, 4), normalize=True).set_dtype(
        torch.float64
    )
    a, b = features(200, 16, 0), features(150, 16, 1, shift=0.1)
    metric.update(a.view(-1, 1, 4, 4), real=True)
    metric.update(b.view(-1, 1, 4, 4), real=False)
    assert distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6), "torchmetrics rounds to float32"


def test_frechet_distance_at_the_edges():
    a = features(50, 8, 0)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    same = torch.ones(10, 8)
    assert distance(same, same) == 0, "identical images"
    assert distance(same, same + 1) == pytest.approx(8)
    assert distance(same, a) == pytest.approx(
        float((a.double().mean(0) - 1).square().sum() + a.double().var(0).sum()), rel=1e-9
    )
    far = a.double() + 1e6
    assert distance(far, far + 1) == pytest.approx(8, rel=1e-6), "far from the origin"


def test_features_that_cannot_be_measured_are_refused():
    a = features(10, 4, 0)
    with pytest.raises(UserError, match="mine: a covariance needs at least 2 images; got 1"):
        Moments.compute(a[:1], "mine")
    broken = a.clone()
    broken[3, 2] = math.nan
    with pytest.raises(UserError, match="mine: the features of 1 images are not finite, first image 3"):
        Moments.compute(broken, "mine")
    with pytest.raises(UserError, match="not finite, first image 3"):
        precision_recall(a, broken)
    with pytest.raises(UserError, match="not finite, first image 3"):
        inception_score(broken)
    with pytest.raises(UserError, match="features of 4 and 5 channels"):
        distance(a, features(10, 5, 0))
    with pytest.raises(UserError, match=r"must be \(images, channels\); got \(10,\)"):
        Moments.compute(a[:, 0], "mine")
    with pytest.raises(UserError, match="at least 4 images in each set"):
        precision_recall(a[:3], a)


# ---- Inception Score


def score_in_numpy(logits, split):
    """ADM's evaluator, written out."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(0, len(p), split):
        part = p[i : i + split]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("split", [5000, 30, 7])
def test_inception_score_against_numpy(split):
    logits = features(100, 12, 0) * 3
    found = inception_score(logits, split)
    assert found == pytest.approx(score_in_numpy(logits.double().numpy(), split), rel=1e-9, abs=1e-12)


def test_inception_score_of_known_distributions():
    assert inception_score(torch.zeros(20, 10))[0] == pytest.approx(1), "nothing is told apart"
    sure = torch.eye(10).repeat(3, 1) * 1e4
    assert inception_score(sure)[0] == pytest.approx(10), "every class, each for sure"
    assert inception_score(sure[:1])[0] == pytest.approx(1), "one image"
    assert inception_score(torch.eye(10)[[0, 0, 1, 1]] * 1e4)[0] == pytest.approx(2)


def test_inception_score_against_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.inception")

    class Eye(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    metric = module.InceptionScore(feature=Eye(), splits=1)
    logits = features(120, 12, 0) * 3
    metric.update(logits.view(-1, 3, 2, 2))
    assert inception_score(logits)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-5)


# ---- precision and recall


def by_brute_force(samples, references, k):
    """Loops over points; ties on the rim count as inside."""

    def radii(points):
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    def share(points, centres, reach):
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres, reach, strict=True)) for p in points]
        return sum(inside) / len(inside)

    return share(samples, references, radii(references)), share(references, samples, radii(samples))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_against_brute_force(k):
    a, b = features(60, 6, 0), features(45, 6, 1, shift=0.8)
    assert precision_recall(a, b, k) == by_brute_force(a.double().tolist(), b.double().tolist(), k)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda d: st.tuples(
            *(st.lists(st.lists(st.integers(-2, 2), min_size=d, max_size=d), min_size=4, max_size=12) for _ in range(2))
        )
    )
)
def test_precision_and_recall_of_points_that_coincide(sets):
    """Whole numbers: many equal points, radii of 0 and points exactly on a rim."""
    found = precision_recall(*(torch.tensor(points).float() for points in sets), 3)
    assert found == pytest.approx(by_brute_force(*sets, 3), abs=1e-12)


def test_precision_and_recall_of_known_sets():
    a = features(50, 6, 0)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 1000) == (0.0, 0.0)
    one_mode = a[:1].repeat(20, 1)  # a generator that makes one image: precise, without recall
    precision, recall = precision_recall(one_mode, a)
    assert precision == 1.0
    assert recall == 1 / 50
    far = a.double() + 1e4
    assert precision_recall(far, far) == (1.0, 1.0), "far from the origin"
