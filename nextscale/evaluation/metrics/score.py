"""Inception Score, from the logits of any classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import check_features


def inception_score(logits_NC: Tensor, split: int = 5000) -> tuple[float, float]:
    """exp of the mean KL(p(class | image) || p(class)): mean and deviation over consecutive splits of `split` images.

    Salimans et al. 2016 (arXiv 1606.03498), split as in the ADM evaluator, including a shorter last split. 1 to C. The
    deviation is 0 for a single split. Several splits must be of images in random order, as ADM's samples are: images
    sorted by class have a far lower score. `evaluate` puts them in an order of their contents.
    """
    check_features(logits_NC, "classifier scores")
    if split < 1:
        raise UserError(f"a split of the Inception Score must have 1 image or more; got {split}")
    scores = []
    for part in logits_NC.double().split(split):
        log_p = part.log_softmax(dim=-1)
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(part))).double().log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=-1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
