"""Nearest neighbours: classification with features, which measures an encoder without training a classifier, and how
near samples are to training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.evaluation.metrics.frechet import check_features

NEIGHBOURS, TEMPERATURE = 20, 0.07
_ROWS, _CHUNK = 1024, 8192


def knn_classes(
    sample_ND: Tensor, bank_MD: Tensor, labels_M: Tensor, neighbours: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """The class (N,), int64, of each sample by a weighted vote of its nearest neighbours in the bank.

    Neighbours are found by cosine similarity, and a vote has the weight exp(cosine / temperature) (Wu et al. 2018,
    arXiv 1805.01978; k = 20 as in DINO). A bank smaller than k votes as a whole. Raises UserError when features are
    missing or not finite.
    """
    check_features(sample_ND, "samples")
    check_features(bank_MD, "the bank")
    bank_MD, classes = F.normalize(bank_MD.float(), dim=1), int(labels_M.max()) + 1
    predicted = []
    for rows_ND in F.normalize(sample_ND.float(), dim=1).split(_ROWS):
        cosine_NK, nearest_NK = (rows_ND @ bank_MD.T).topk(min(neighbours, len(bank_MD)), dim=1)
        votes_NC = torch.zeros(len(rows_ND), classes, device=rows_ND.device)
        votes_NC.scatter_add_(1, labels_M[nearest_NK], (cosine_NK / temperature).exp())
        predicted.append(votes_NC.argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(sample_ND: Tensor, labels_N: Tensor, bank_MD: Tensor, labels_M: Tensor) -> float:
    """Share of samples, 0 to 1, whose class `knn_classes` predicts correctly."""
    return float((knn_classes(sample_ND, bank_MD, labels_M) == labels_N).double().mean())


def find_nearest(images_NP: Tensor, references_MP: Tensor, neighbours: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest references of each image: root-mean-square distances (N, k), rising, and their indices (N, k).

    Images of any shape, floats in 0 to 1; references of the same shape, in 0 to 1 or uint8. k is at most the number of
    references.
    """
    rows, k = images_NP.flatten(1).float(), min(neighbours, len(references_MP))
    best, index = torch.full((len(rows), k), torch.inf), torch.zeros(len(rows), k, dtype=torch.int64)
    for start, chunk in zip(range(0, len(references_MP), _CHUNK), references_MP.split(_CHUNK), strict=True):
        others = chunk.flatten(1).float() / (255 if chunk.dtype == torch.uint8 else 1)
        distances = torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
        found = torch.cat((best, distances), dim=1).topk(k, dim=1, largest=False)
        places = torch.arange(start, start + len(others)).expand(len(rows), -1)
        best, index = found.values, torch.cat((index, places), dim=1).gather(1, found.indices)
    exact = rows[:, None] - references_MP[index].flatten(2).float() / (255 if references_MP.dtype == torch.uint8 else 1)
    return exact.square().mean(dim=2).sqrt(), index


def compute_share_of_copies(samples_N: Tensor, held_out_M: Tensor) -> float:
    """Share of samples that are nearer to a training image than 95 % of the held-out images are, by their distances to
    the nearest one. A model whose images are as new as the held-out ones has about 0.05."""
    return float((samples_N < held_out_M.quantile(0.05)).double().mean())
