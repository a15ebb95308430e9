"""Metrics from features. Each metric is named after the network whose features it is computed from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.data.classes import Classes, match_classes
from nextscale.evaluation.metrics.frechet import Moments, frechet_distance
from nextscale.evaluation.metrics.manifold import precision_recall
from nextscale.evaluation.metrics.score import inception_score
from nextscale.evaluation.reference import Reference

_PUBLISHED = {
    "distance": "fid",
    "spatial_distance": "sfid",
    "score": "inception_score",
    "score_deviation": "inception_score_deviation",
    "precision": "precision",
    "recall": "recall",
}
METRICS = tuple(_PUBLISHED)
"""Names of the metrics, independent of the feature network."""


def name_metric(metric: str, network: str) -> str:
    """The published name where the features are Inception's, else a name that contains the network's."""
    if network == "inception":
        return _PUBLISHED[metric]
    if metric == "distance" and network != "classifier":
        return f"fd_{network}"
    return f"{network}_{'fd' if metric == 'distance' else metric}"


def compute_metrics(
    network: str, samples: dict[str, Tensor], where: str, reference: Reference | None, split: int, neighbours: int
) -> dict[str, Any]:
    """All metrics that these features (pool, spatial, logits) allow.

    Raises UserError as the metrics do, and when features are not finite.
    """
    for kind, tensor in samples.items():
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise UserError(f"{where}: {network}'s features ({kind}) are not finite; its weights are damaged")
    values: dict[str, float] = {}
    notes: list[str] = []
    if "logits" in samples:
        values["score"], values["score_deviation"] = inception_score(samples["logits"], split)
    if reference is not None:
        count, width = samples["pool"].shape
        for kind, name in (("pool", "distance"), ("spatial", "spatial_distance")):
            if kind in samples and kind in reference.moments:
                moments = Moments.compute(samples[kind], f"{where} ({kind})")
                values[name] = frechet_distance(moments, reference.moments[kind])
        if count <= width:
            notes.append(
                f"{count} images for {width} channels: the covariance is singular, the distance biased upwards"
            )
        if reference.pool_MD is None:
            notes.append(f"no precision and recall: {reference.where} has statistics alone")
        else:
            values["precision"], values["recall"] = precision_recall(samples["pool"], reference.pool_MD, neighbours)
    return {name_metric(name, network): value for name, value in values.items()} | ({"notes": notes} if notes else {})


def compute_class_accuracy(
    logits_NC: Tensor, labels_N: Tensor, classes: Classes, known: Classes
) -> tuple[float | None, str]:
    """(share of images that the classifier assigns to the class they were generated for, a note).

    `classes`: of the labels, by name among the classifier's, `known`, which may have more. The share is None, and the
    note says why, where they cannot be matched; the note is empty where they have the same names.
    """
    try:
        match = match_classes(classes, known, subset=True)
    except UserError as error:
        return None, f"no classifier_read_as_asked: {error}"
    return float((logits_NC.argmax(dim=1) == match.map_labels(labels_N)).double().mean()), match.note


def summarize_values(values_N: Tensor) -> dict[str, float]:
    """Mean and standard deviation of one value per image."""
    return {"mean": float(values_N.double().mean()), "deviation": float(values_N.double().std(correction=0))}
