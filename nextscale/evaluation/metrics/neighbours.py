"""k-nearest-neighbour classification with features: measures an encoder without training a classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.evaluation.metrics.frechet import check_features

NEIGHBOURS, TEMPERATURE = 20, 0.07
_ROWS = 1024


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
