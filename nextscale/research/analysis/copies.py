"""Whether a generator copies its training images: samples beside the training images nearest to them.

Letters: N samples, M training images, P values of an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.pictures import to_pil
from nextscale.config.analysis import CopiesConfig
from nextscale.config.condition import OTHERS
from nextscale.config.data import ReadConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.data.datasets import ImageSet, load_images, read_images
from nextscale.data.given import ImageConditions, open_given
from nextscale.data.parts import choose_part
from nextscale.evaluation.metrics.neighbours import compute_share_of_copies, find_nearest
from nextscale.pipeline import Labels, Pipeline
from nextscale.research.analysis.analyzed_model import choose_labels, is_empty
from nextscale.research.analysis.figures import Row, plot_image_rows

_NEIGHBOURS = 3


def analyse_copies(
    model: str, data: str, held_out: str, out: Path, config: CopiesConfig | None = None,
    sampling: SampleConfig | None = None, *, labels: Labels = (), reading: ReadConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare samples with training images by the distance of their pixels; writes copies.json and copies.png.

    `data`: the training images, `held_out`: real images that were not trained on, both as `open_source` takes them.
    `labels`: classes of the samples in turn, as `Pipeline.sample` takes them; empty = all classes. A model that draws
    from more than a class has the captions, edges or labels of held-out images. Distances are the root mean square of
    pixels in 0 to 1. Held-out images say how near a new image comes to the nearest training image. Returns the content
    of copies.json. Raises UserError for images that cannot be read.
    """
    config, sampling = config or CopiesConfig(), sampling or SampleConfig()
    pipeline = Pipeline.from_pretrained(model, device=config.device)
    conditioned = pipeline.transformer.config.condition.kind in OTHERS
    train = _load_images(data, pipeline, conditioned, reading)
    others = _load_images(held_out, pipeline, conditioned, reading, config.num)
    if sorted(train.class_names) != sorted(others.class_names):
        raise UserError(f"{data} and {held_out} have other classes: give images of one data set")
    if conditioned and is_empty(labels):
        given = _read_conditions(held_out, model, pipeline, config.num, reading)
    else:
        given = {"labels": choose_labels(pipeline, labels, config.num)}
    samples = pipeline.sample(config=sampling, batch_size=config.batch_size, progress=True, **given)
    distances_NK, nearest_NK = find_nearest(samples.tensor, train.images_B3HW, _NEIGHBOURS)
    held_out_N1, _ = find_nearest(others.images_B3HW / 255, train.images_B3HW, 1)
    order = distances_NK[:, 0].argsort()
    report = {
        "analysis": "copies", "model": model, "data": train.inputs, "held_out": others.inputs,
        "training_images": len(train), "samples": config.num, "sampling": to_dict(sampling),
        "machine": describe_machine(pipeline.device),
        "share_of_copies": compute_share_of_copies(distances_NK[:, 0], held_out_N1[:, 0]),
        "distance": {"samples": _describe(distances_NK[:, 0]), "held_out": _describe(held_out_N1[:, 0])},
        "nearest_pairs": [
            {"sample": i, "training_image": int(nearest_NK[i, 0]), "distance": float(distances_NK[i, 0])}
            for i in order[: config.shown].tolist()
        ],
    }  # fmt: skip
    write_json(out / "copies.json", report)
    chosen = {
        "first samples, and the distance to the nearest training image": list(range(min(config.shown, config.num))),
        "samples nearest to a training image": order[: config.shown].tolist(),
    }
    panels = {
        title: ([f"{distances_NK[i, 0]:.3f}" for i in rows], _draw_rows(samples.tensor[rows], train, nearest_NK[rows]))
        for title, rows in chosen.items()
    }
    plot_image_rows(panels, out / "copies.png")
    return report


def _load_images(
    data: str, pipeline: Pipeline, conditioned: bool, reading: ReadConfig | None, limit: int = 10**9
) -> ImageSet:
    """Images of the model's size; labels may be missing where it draws from more than a class."""
    size = pipeline.config.image_size
    if not conditioned:
        return load_images(data, size, limit=limit, config=reading)
    return read_images(open_given(data, pipeline.config, reading), size, limit, 0)


def _read_conditions(
    held_out: str, model: str, pipeline: Pipeline, count: int, reading: ReadConfig | None
) -> dict[str, Any]:
    """Keywords of `Pipeline.sample` for `count` samples, of held-out images of all classes."""
    conditions = ImageConditions(held_out, model, pipeline.config, reading)
    chosen = choose_part(len(conditions), count, conditions.labels_N)
    return conditions.read([int(chosen[i % len(chosen)]) for i in range(count)])


def _describe(distance_N: Tensor) -> dict[str, float]:
    names = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95}
    return {name: float(distance_N.quantile(share)) for name, share in names.items()}


def _draw_rows(samples_n3HW: Tensor, train: ImageSet, nearest_nK: Tensor) -> list[Row]:
    """Samples above the training images nearest to them."""
    rows: list[Row] = [("sample", to_pil(samples_n3HW), None)]
    for k, name in enumerate(("nearest training image", "second", "third")[: nearest_nK.shape[1]]):
        rows.append((name, to_pil(train.images_B3HW[nearest_nK[:, k]].to(torch.float32) / 255), None))
    return rows
