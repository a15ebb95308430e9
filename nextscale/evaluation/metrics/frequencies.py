"""A baseline for generators: the cross-entropy of token frequencies by class and position."""

from __future__ import annotations

import torch
from torch import Tensor

_SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_MAX_CELLS = 2**28


def frequency_loss(
    train_NL: Tensor, train_labels_N: Tensor, held_ML: Tensor, held_labels_M: Tensor, classes: int, vocab: int
) -> float | None:
    """Cross-entropy (nats per token) of held-out tokens under the class-conditional token frequencies of each position.

    The frequencies are smoothed by a constant added to the training counts. The constant is chosen on the held-out
    tokens, so the value is a lower bound of this baseline's loss. None when the table would be too large.
    """
    length = train_NL.shape[1]
    if classes * length * vocab > _MAX_CELLS:
        return None
    offset_L = torch.arange(length) * vocab
    counts = torch.zeros(classes * length * vocab)
    cells_NL = (train_labels_N.long() * length * vocab)[:, None] + offset_L + train_NL.long()
    counts.index_add_(0, cells_NL.flatten(), torch.ones(cells_NL.numel()))
    totals = counts.view(classes, length, vocab).sum(-1)[held_labels_M.long()]
    hits_ML = counts[(held_labels_M.long() * length * vocab)[:, None] + offset_L + held_ML.long()]
    losses = [-((hits_ML + a) / (totals + a * vocab)).log().mean().item() for a in _SMOOTHING]
    return min(losses)
