"""From features to figures, each named after the network whose features it is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.frechet import Moments, frechet_distance
from nextscale.evaluation.metrics.manifold import precision_recall
from nextscale.evaluation.metrics.score import inception_score
from nextscale.evaluation.reference import Reference

Tensors = dict[str, Tensor]
_PUBLISHED = {
    "distance": "fid",
    "spatial_distance": "sfid",
    "score": "inception_score",
    "score_deviation": "inception_score_deviation",
    "precision": "precision",
    "recall": "recall",
}
NEUTRAL = tuple(_PUBLISHED)
"""Names of figures whatever the features."""


def name_of(measure: str, network: str) -> str:
    """The published name where the features are Inception's; else one that says whose they are."""
    if network == "inception":
        return _PUBLISHED[measure]
    if measure == "distance" and network != "classifier":
        return f"fd_{network}"
    return f"{network}_{'fd' if measure == 'distance' else measure}"


def measure(
    network: str, samples: Tensors, where: str, reference: Reference | None, split: int, neighbours: int
) -> dict[str, Any]:
    """All figures that these features (pool, spatial, logits) allow. Raises UserError as the metrics do."""
    values: dict[str, float] = {}
    notes: list[str] = []
    if "logits" in samples:
        values["score"], values["score_deviation"] = inception_score(samples["logits"], split)
    if reference is not None:
        count, width = samples["pool"].shape
        for kind, name in (("pool", "distance"), ("spatial", "spatial_distance")):
            if kind in samples and kind in reference.moments:
                values[name] = frechet_distance(Moments.of(samples[kind], f"{where} ({kind})"), reference.moments[kind])
        if count <= width:
            notes.append(
                f"{count} images for {width} channels: the covariance is singular, the distance biased upwards"
            )
        if reference.pool_MD is None:
            notes.append(f"no precision and recall: {reference.where} has statistics alone")
        else:
            values["precision"], values["recall"] = precision_recall(samples["pool"], reference.pool_MD, neighbours)
    return {name_of(name, network): value for name, value in values.items()} | ({"notes": notes} if notes else {})


def read_as_asked(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Share of images that the classifier gives the class that was asked for."""
    if int(labels_N.max()) >= logits_NC.shape[1]:
        raise UserError(
            f"the images' classes go up to {int(labels_N.max())}, the classifier knows {logits_NC.shape[1]}"
        )
    return float((logits_NC.argmax(dim=1) == labels_N).double().mean())


def summary(values: Tensor) -> dict[str, float]:
    """Mean and deviation of per-image values."""
    return {"mean": float(values.double().mean()), "deviation": float(values.double().std(correction=0))}
