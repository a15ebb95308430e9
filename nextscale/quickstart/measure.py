"""The quality of the quickstart's samples, by classifiers on pixels and by distances to real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.common.extras import check_extras
from nextscale.data.datasets import ImageSet
from nextscale.evaluation.metrics.neighbours import compute_share_of_copies, find_nearest

_MAX_FIT = 4000
_TESTED = 500
_COMPONENTS = 64


def measure_samples(train: ImageSet, held_out: ImageSet, images_B3HW: Tensor, labels_B: Tensor) -> dict[str, Any]:
    """Compare generated images (float in [0, 1]), and the labels they were asked for, with real ones.

    - `generated_read_as_asked`: share of the first 500 that a classifier fitted on real training images reads as the
      label asked for. `real_held_out_read_right` is the same classifier on held-out real images: its ceiling.
    - `held_out_read_by_generated_fit`: share of held-out real images that a classifier fitted on generated ones reads
      right. A model that has collapsed to a few images per class fails here.
    - `distance_to_nearest_training_image`: mean root-mean-square pixel distance, of generated and of held-out real
      images: a model that copies its training set has distances far below the real ones'.
    - `copies`: share of generated images that are nearer to a training image than 95 % of the held-out images are. A
      model that generates images as new as the held-out ones has about 0.05.
    """
    generated = _flatten_pixels((images_B3HW * 255).round().to(torch.uint8))
    real, other = _flatten_pixels(train.images_B3HW[:_MAX_FIT]), _flatten_pixels(held_out.images_B3HW[:_MAX_FIT])
    asked, labels = labels_B.numpy(), train.labels_B[:_MAX_FIT].numpy()
    answers = held_out.labels_B[:_MAX_FIT].numpy()
    references = torch.from_numpy(real)
    distances = [find_nearest(torch.from_numpy(rows[:_TESTED]), references)[0][:, 0] for rows in (generated, other)]
    result: dict[str, Any] = {
        "distance_to_nearest_training_image": {
            "generated": float(distances[0].mean()),
            "held_out_real": float(distances[1].mean()),
        },
        "copies": compute_share_of_copies(*distances),
        "generated_images": len(generated),
    }
    if len(set(labels.tolist())) > 1 and len(set(asked.tolist())) > 1:
        on_real, on_generated = _fit_classifier(real, labels), _fit_classifier(generated, asked)
        result |= {
            "generated_read_as_asked": float(on_real.score(generated[:_TESTED], asked[:_TESTED])),
            "real_held_out_read_right": float(on_real.score(other, answers)),
            "held_out_read_by_generated_fit": float(on_generated.score(other, answers)),
        }
    return result


def check_available() -> None:
    """Raise UserError now, rather than after the training, when scikit-learn or matplotlib is absent."""
    check_extras(dict.fromkeys(("matplotlib", "sklearn"), "the quickstart"))


def _flatten_pixels(images_B3HW: Tensor) -> np.ndarray:
    """uint8 images as rows of floats in [0, 1]."""
    return images_B3HW.flatten(1).numpy().astype(np.float32) / 255


def _fit_classifier(rows: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    return make_pipeline(PCA(min(_COMPONENTS, *rows.shape), random_state=0), SVC(C=10)).fit(rows, labels)
