"""Balanced k-means: clusters that all hold the same number of points.

The published code solves the assignment step with a min-cost flow solver. This one needs no solver: Sinkhorn iterations
find a price for each cluster that evens out the demand, the result is rounded to whole points, and pairs of clusters
swap points as long as that lowers the cost.

Letters: F points (hidden units), E clusters (experts), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.common.precision import widen

_LOWEST_TEMPERATURE, _SINKHORN_STEPS = 0.02, 40
_SWAP_LIMIT = 64
"""Swaps are tried up to this number of clusters: the pairs grow with its square, and their gain does not."""


def run_balanced_kmeans(x_FD: Tensor, count: int, rng: torch.Generator, iterations: int = 20) -> Tensor:
    """The cluster of each row, int64 (F,). Each of the `count` clusters has exactly F / count rows.

    Balanced k-means of the rows scaled to length 1 (D2DMoE, arXiv 2310.04361; MoEfication, arXiv 2110.01786), from
    centers drawn by k-means++. Stops after `iterations` or when the cost no longer falls.
    """
    points = len(x_FD)
    assert points % count == 0, f"{points} points cannot be divided evenly among {count} clusters"
    x_FD = F.normalize(x_FD.float(), dim=1)
    if count in (1, points):
        return torch.arange(points) % count
    center_ED = _draw_centers(x_FD, count, rng)
    label_F = torch.full((points,), -1)
    for _ in range(iterations):
        cost_FE = _square_distances(x_FD, center_ED)
        new_F = assign_balanced(cost_FE)
        if label_F[0] >= 0 and _sum_costs(cost_FE, new_F) >= _sum_costs(cost_FE, label_F) - 1e-6:
            break  # so the cost never rises
        label_F = new_F
        center_ED = torch.zeros_like(center_ED).index_add_(0, label_F, x_FD) / (points // count)
    return label_F


def _draw_centers(x_FD: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """k-means++: each center is a point drawn with probability proportional to its squared distance to the nearest
    center drawn before."""
    drawn = [int(torch.randint(len(x_FD), (), generator=rng))]
    nearest_F = torch.full((len(x_FD),), torch.inf)
    for _ in range(count - 1):
        nearest_F = torch.minimum(nearest_F, (x_FD - x_FD[drawn[-1]]).square().sum(dim=1))
        drawn.append(int(torch.multinomial(nearest_F.clamp_min(1e-12), 1, generator=rng)))
    return x_FD[drawn]


def _square_distances(x_FD: Tensor, center_ED: Tensor) -> Tensor:
    return center_ED.square().sum(dim=1) - 2 * x_FD @ center_ED.T + x_FD.square().sum(dim=1, keepdim=True)


def _sum_costs(cost_FE: Tensor, label_F: Tensor) -> float:
    return widen(cost_FE.gather(1, label_F[:, None])).sum().item()


def assign_balanced(cost_FE: Tensor) -> Tensor:
    """An assignment (F,) of points to clusters of exactly F / E points each, whose cost is near the lowest."""
    points, count = cost_FE.shape
    capacity, score_FE = points // count, -cost_FE
    label_F = _round_assignment(score_FE - _find_prices(score_FE, capacity), capacity)
    return _swap_points(score_FE, label_F) if count <= _SWAP_LIMIT else label_F


def _find_prices(score_FE: Tensor, capacity: int) -> Tensor:
    """Sinkhorn iterations with a falling temperature: a cluster in demand becomes dearer, until each attracts about
    `capacity` points."""
    price_E = torch.zeros(score_FE.shape[1])
    spread = float(score_FE.std()) or 1.0
    for step in range(_SINKHORN_STEPS):
        temperature = spread * max(_LOWEST_TEMPERATURE, 0.8**step)
        share_FE = ((score_FE - price_E) / temperature).log_softmax(dim=1)
        price_E += temperature * (share_FE.logsumexp(dim=0) - torch.tensor(float(capacity)).log())
    return price_E


def _round_assignment(value_FE: Tensor, capacity: int) -> Tensor:
    """Each point applies to the cluster with free places that it values most. Where too many apply, the points that
    would lose most elsewhere are taken; the others apply again."""
    points, count = value_FE.shape
    label_F, free_E = torch.full((points,), -1), torch.full((count,), capacity)
    value_FE = value_FE.clone()
    while (waiting_W := (label_F < 0).nonzero().squeeze(1)).numel():
        value_FE[:, free_E == 0] = -torch.inf
        best_W2, cluster_W2 = value_FE[waiting_W].topk(min(2, count), dim=1)
        regret_W = best_W2[:, 0] - best_W2[:, -1]
        for cluster in cluster_W2[:, 0].unique().tolist():
            applicants = (cluster_W2[:, 0] == cluster).nonzero().squeeze(1)
            order = regret_W[applicants].argsort(descending=True, stable=True)
            taken = applicants[order[: int(free_E[cluster])]]
            label_F[waiting_W[taken]] = cluster
            free_E[cluster] -= len(taken)
    return label_F


def _swap_points(score_FE: Tensor, label_F: Tensor) -> Tensor:
    """Swap points between two clusters, those that gain most first, until no pair of clusters gains."""
    count, gained = score_FE.shape[1], True
    while gained:
        gained = False
        for a in range(count):
            for b in range(a + 1, count):
                in_a, in_b = (label_F == a).nonzero().squeeze(1), (label_F == b).nonzero().squeeze(1)
                to_b = (score_FE[in_a, b] - score_FE[in_a, a]).sort(descending=True, stable=True)
                to_a = (score_FE[in_b, a] - score_FE[in_b, b]).sort(descending=True, stable=True)
                gains = to_b.values + to_a.values > 1e-6
                if gains[0]:
                    label_F[in_a[to_b.indices[gains]]], label_F[in_b[to_a.indices[gains]]] = b, a
                    gained = True
    return label_F
