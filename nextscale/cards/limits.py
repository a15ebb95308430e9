"""What a model cannot do, and what its figures cannot be compared with, as far as it follows from its facts."""

from __future__ import annotations

from collections.abc import Sequence

from nextscale.cards.model import CardModel
from nextscale.cards.reports import Figures
from nextscale.cards.training import Training

_FEW_IMAGES = 10_000
_MANY_PASSES = 50
_PUBLISHED = ("fid", "sfid", "inception_score")


def list_limits(model: CardModel, training: Training, figures: Sequence[Figures], told: bool = False) -> list[str]:
    """Sentences in plain words. `told`: a person's text follows, which may say what no file does."""
    limits = [*_list_uses(model), *_list_of_training(model, training), *_list_of_figures(model, figures)]
    if not (told or training.data or training.steps or training.datasets or model.is_official):
        limits.append("Nothing in its folder says how it was trained.")
    return limits


def _list_uses(model: CardModel) -> list[str]:
    height, width = model.size
    size = f"{height} x {width} pixels"
    if model.kind == "generator":
        limits = [f"It generates images of {size} and no other size; `nextscale adapt` and more training change that."]
        if model.classes:
            known = f"the {model.classes:,} classes above" if model.classes > 1 else "one class"
            limits.append(f"It knows {known} and nothing else. It takes no text.")
        if model.is_int8:
            limits.append("It computes on a CPU alone, and can be sampled, scored and measured, not trained.")
        return limits
    if model.kind == "tokenizer":
        return [f"It encodes images of {size}; others are resized and cropped. Fine detail is lost."]
    if model.kind == "classifier":
        return [f"It resizes images to {size}, and assigns one of its {model.classes} classes to every image."]
    return [f"It was made for images of {size} and small generators. Measure it before you use it for another task."]


def _list_of_training(model: CardModel, training: Training) -> list[str]:
    limits = []
    if training.images:
        text = f"It was trained on {training.images:,} images."
        if training.images < _FEW_IMAGES or training.passes > _MANY_PASSES:
            text += (
                " It may repeat them: compare what it generates with the nearest training images before you use it."
                if model.kind == "generator"
                else " On other kinds of images it may be much worse."
            )
        limits.append(text)
    if training.best_step:
        limits.append(
            f"The held-out loss was lowest at step {training.best_step:,} and rose after it, while the training loss "
            "fell: the model learnt its training images by heart."
        )
    if training.steps and training.steps < training.planned_steps:
        limits.append(f"Its training was not finished: {training.steps:,} of {training.planned_steps:,} steps.")
    return limits


def _list_of_figures(model: CardModel, figures: Sequence[Figures]) -> list[str]:
    if not figures:
        return ["No report on these weights lies in its folder, so the card has no figures."]
    names = {name for found in figures for name in found.values}
    limits = []
    if names & {*_PUBLISHED}:
        limits.append("FID and Inception Score depend on the number of images: compare them at equal numbers alone.")
    others = sorted(name for name in names if name.startswith(("classifier_", "fd_", "dinov2_")))
    if others and model.kind in ("generator", "tokenizer"):
        limits.append(
            f"{others[0]} and the like are no FID: compare them only with figures of the same feature network, "
            "reference and number of images."
        )
    return limits
