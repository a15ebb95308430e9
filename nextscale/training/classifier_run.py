"""`nextscale classifier train` and `nextscale classifier evaluate`, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.plots import plot_curves
from nextscale.common.rng import fold_seed
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.parse import to_dict
from nextscale.data.datasets import load_images
from nextscale.data.examples import Examples
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.training.classifier_task import ClassifierTask
from nextscale.training.engine.log import Values, read_log
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.open_run import open_run

_BATCH = 200


def train_classifier(
    config: ClassifierRunConfig, data: str, folder: Path, world: World | None = None, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a classifier on `data` into `folder`; return what was measured on held-out images last.

    Beside the classifier: curves.png, log.jsonl, run.json. Called again with the same folder it goes on where it
    stopped. Raises UserError and train.loop.Interrupted as `fit` does.
    """
    world = world or World()
    settings = {"data": data, **to_dict(config)}
    examples, held_out, source = open_run(
        folder, settings, config.classifier.image_size, config.images, config.train.seed, world,
        accept_changes=accept_changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(config.train.seed, "classifier"))
        model = Classifier(config.classifier, source.class_names)
    task = ClassifierTask(model, examples, config.shift, config.train.label_smoothing)
    callbacks = _Callbacks(task, held_out, folder, world)
    train(
        task, config.train, folder, callbacks, world=world, settings=settings,
        accept_changes=True,  # they were compared with run.json, which may be newer than the last state
        max_unreadable=config.images.max_unreadable,
    )  # fmt: skip
    if not world.main:
        return {}
    log = read_log(folder / "log.jsonl")
    panels = {
        "nats": {"training": "loss", "validation": "validation_loss"},
        "accuracy": {"training": "accuracy", "validation": "validation_accuracy"},
    }
    plot_curves(
        {p: {n: [(r["step"], r[k]) for r in log if k in r] for n, k in lines.items()} for p, lines in panels.items()},
        folder / "curves.png",
    )
    return [r for r in log if "validation_loss" in r][-1]


class _Callbacks(Callbacks):
    """What happens at a save: validation and the model's files."""

    def __init__(self, task: ClassifierTask, held_out: Examples, folder: Path, world: World):
        self.task, self.held_out, self.folder, self.world = task, held_out, folder, world

    def validate(self, step: int) -> Values:
        return {f"validation_{n}": v for n, v in measure(self.task, self.held_out).items()} if self.world.main else {}

    def save_model(self, step: int, best: bool) -> None:
        if self.world.main:
            for folder in (self.folder, self.folder / "best") if best else (self.folder,):
                self.task.model.save(folder)


@torch.no_grad()
def measure(task: ClassifierTask, examples: Examples) -> dict[str, float]:
    """Loss (nats) and accuracy on all examples."""
    sums = {"loss": 0.0, "accuracy": 0.0}
    device = next(task.model.parameters()).device
    for start in range(0, len(examples), _BATCH):
        batch = examples.fetch(range(start, min(start + _BATCH, len(examples))), None)
        share = len(batch["label"]) / len(examples)
        loss, scalars = task({"image": batch["image"].to(device), "label": batch["label"].to(device)}, {}, 0)
        sums["loss"] += share * loss.item()
        sums["accuracy"] += share * scalars["accuracy"].item()
    return sums


def evaluate_classifier(folder: Path, data: str, out: Path | None) -> dict[str, Any]:
    """Loss and accuracy of a classifier on all images of `data`; UserError when the classes have other names."""
    model = load_classifier(folder)
    images = load_images(data, model.config.image_size)
    images.print_notes()
    if images.class_names != model.class_names:
        raise UserError(
            f"{data} has the classes {', '.join(images.class_names[:5])}, ...; {folder} knows "
            f"{', '.join(model.class_names[:5])}, ..."
        )
    report = {"data": data, "images": len(images)} | measure(
        ClassifierTask(model, images.to_examples(), 0, 0.0), images.to_examples()
    )
    if out is not None:
        write_json(out, report)
    return report
