"""Clusters of exactly equal size: k-means whose every cluster holds the same number of points.

What the published code gets from a min-cost flow solver, by a short routine of our own: prices that level the demand
for the clusters, then rounding, then exchanges of two points while any lowers the cost.

Letters: F points (hidden units), E clusters (experts), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARPEST, _ROUNDS = 0.02, 40
_EXCHANGES = 64
"""Clusters up to which pairs of them exchange points; beyond that the pairs are too many for what they gain."""


def balanced_clusters(x_FD: Tensor, count: int, rng: torch.Generator, iterations: int = 20) -> Tensor:
    """Which of `count` clusters each row belongs to, int64 (F,): every cluster has F / count rows, a whole number.

    Balanced k-means of the rows scaled to length 1 (D2DMoE, arXiv 2310.04361; MoEfication, arXiv 2110.01786), from
    centres drawn by k-means++. Stops after `iterations` or when nothing changes.
    """
    points = len(x_FD)
    assert points % count == 0, f"{points} points cannot be divided evenly among {count} clusters"
    x_FD = F.normalize(x_FD.float(), dim=1)
    if count in (1, points):
        return torch.arange(points) % count
    centre_ED = _first_centres(x_FD, count, rng)
    label_F = torch.full((points,), -1)
    for _ in range(iterations):
        cost_FE = _distances(x_FD, centre_ED)
        new_F = balanced_assignment(cost_FE)
        if label_F[0] >= 0 and _total(cost_FE, new_F) >= _total(cost_FE, label_F) - 1e-6:
            break  # so the cost never rises
        label_F = new_F
        centre_ED = torch.zeros_like(centre_ED).index_add_(0, label_F, x_FD) / (points // count)
    return label_F


def _first_centres(x_FD: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """k-means++: each centre is a point drawn with its squared distance to the nearest one before."""
    chosen = [int(torch.randint(len(x_FD), (), generator=rng))]
    nearest_F = torch.full((len(x_FD),), torch.inf)
    for _ in range(count - 1):
        nearest_F = torch.minimum(nearest_F, (x_FD - x_FD[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(torch.multinomial(nearest_F.clamp_min(1e-12), 1, generator=rng)))
    return x_FD[chosen]


def _distances(x_FD: Tensor, centre_ED: Tensor) -> Tensor:
    return centre_ED.square().sum(dim=1) - 2 * x_FD @ centre_ED.T + x_FD.square().sum(dim=1, keepdim=True)


def _total(cost_FE: Tensor, label_F: Tensor) -> float:
    return cost_FE.gather(1, label_F[:, None]).double().sum().item()


def balanced_assignment(cost_FE: Tensor) -> Tensor:
    """A cheap assignment (F,) of points to clusters of exactly F / E points each; near the cheapest."""
    points, count = cost_FE.shape
    room = points // count
    score_FE = -cost_FE
    price_E = torch.zeros(count)
    spread = float(score_FE.std()) or 1.0
    for turn in range(_ROUNDS):  # Sinkhorn's iteration, ever sharper: a cluster in demand becomes dearer
        heat = spread * max(_SHARPEST, 0.8**turn)
        share_FE = ((score_FE - price_E) / heat).log_softmax(dim=1)
        price_E += heat * (share_FE.logsumexp(dim=0) - torch.tensor(float(room)).log())
    label_F = _rounded(score_FE - price_E, room)
    return _exchanged(score_FE, label_F) if count <= _EXCHANGES else label_F


def _rounded(value_FE: Tensor, room: int) -> Tensor:
    """Points apply to the cluster with room that they value most; it takes those who would lose most elsewhere."""
    points, count = value_FE.shape
    label_F, free_E = torch.full((points,), -1), torch.full((count,), room)
    value_FE = value_FE.clone()
    while (waiting_W := (label_F < 0).nonzero().squeeze(1)).numel():
        value_FE[:, free_E == 0] = -torch.inf
        best_W2, place_W2 = value_FE[waiting_W].topk(min(2, count), dim=1)
        regret_W = best_W2[:, 0] - best_W2[:, -1]
        for cluster in place_W2[:, 0].unique().tolist():
            mine = (place_W2[:, 0] == cluster).nonzero().squeeze(1)
            taken = mine[regret_W[mine].argsort(descending=True, stable=True)[: int(free_E[cluster])]]
            label_F[waiting_W[taken]] = cluster
            free_E[cluster] -= len(taken)
    return label_F


def _exchanged(score_FE: Tensor, label_F: Tensor) -> Tensor:
    """Let two clusters exchange points, the most willing first, until no pair of clusters gains."""
    count, gained = score_FE.shape[1], True
    while gained:
        gained = False
        for a in range(count):
            for b in range(a + 1, count):
                in_a, in_b = (label_F == a).nonzero().squeeze(1), (label_F == b).nonzero().squeeze(1)
                to_b = (score_FE[in_a, b] - score_FE[in_a, a]).sort(descending=True, stable=True)
                to_a = (score_FE[in_b, a] - score_FE[in_b, b]).sort(descending=True, stable=True)
                pays = to_b.values + to_a.values > 1e-6
                if pays[0]:
                    label_F[in_a[to_b.indices[pays]]], label_F[in_b[to_a.indices[pays]]] = b, a
                    gained = True
    return label_F
