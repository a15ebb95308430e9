"""`nextscale classifier train` and `nextscale classifier evaluate`: its features measure small images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.checkpoints.verify import list_digests
from nextscale.common.devices import find_device
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.rng import fold_seed
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.data import ReadConfig
from nextscale.data.classes import Classes, match_classes, read_trained_classes, relabel
from nextscale.data.examples import Batch, Examples
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.training.engine.log import Values
from nextscale.training.engine.task import Task
from nextscale.training.open_run import (
    MainProcessCallbacks,
    load_test_images,
    open_image_run,
    plot_log,
    read_batches,
    resolve_precision,
)

_BATCH = 200


class ClassifierTask(Task):
    """Cross-entropy of labels, on uint8 images that are shifted by some pixels."""

    name = "classifier"

    def __init__(self, model: Classifier, examples: Examples, max_shift: int, label_smoothing: float):
        super().__init__()
        self.model, self.examples, self.trained = model, examples, model
        self.max_shift, self.label_smoothing = max_shift, label_smoothing

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"shift": torch.randint(2 * self.max_shift + 1, (count, 2), generator=rng)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_B3HW, label_B = batch["image"], batch["label"]
        if noise:
            image_B3HW = shift_images(image_B3HW, noise["shift"], self.max_shift)
        logits_BC = self.model.forward_once(image_B3HW)[1] if noise else self.model(image_B3HW).logits_BC
        loss = F.cross_entropy(logits_BC, label_B, label_smoothing=self.label_smoothing if noise else 0.0)
        return loss, {"accuracy": (logits_BC.detach().argmax(-1) == label_B).float().mean()}


def shift_images(image_B3HW: Tensor, shift_B2: Tensor, max_shift: int) -> Tensor:
    """Crops of the images' size from images with a mirrored border of `max_shift` pixels.

    `shift_B2`: (row, column) where each crop starts, 0 to 2 max_shift.
    """
    B, _, H, W = image_B3HW.shape
    rows_BH = _mirror_indices(shift_B2[:, :1] - max_shift + torch.arange(H, device=image_B3HW.device), H)
    columns_BW = _mirror_indices(shift_B2[:, 1:] - max_shift + torch.arange(W, device=image_B3HW.device), W)
    index_B = torch.arange(B, device=image_B3HW.device)
    image_BHW3 = image_B3HW.permute(0, 2, 3, 1)
    return image_BHW3[index_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def _mirror_indices(index: Tensor, size: int) -> Tensor:
    """Indices outside 0 to size - 1 mirrored at the border, which is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def train_classifier(
    config: ClassifierRunConfig, data: str, folder: Path, world: World | None = None, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a classifier on `data` into `folder`; return its last validation.

    Beside the classifier: curves.png, log.jsonl, run.json. A second call with the same folder resumes an interrupted
    run. Raises UserError and Interrupted as `engine.loop.train` does.
    """
    world = world or World()
    config = resolve_precision(config, folder, world)
    run, examples, held_out, source = open_image_run(
        folder, data, config, config.classifier.image_size, world, accept_changes=accept_changes
    )
    classes = Classes.of_data(data, source.class_names)
    match = match_classes(classes, read_trained_classes(folder) or classes)
    if world.main:
        match.print_note()
    examples, held_out = relabel(examples, match), relabel(held_out, match)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(config.train.seed, "classifier"))
        model = Classifier(config.classifier, match.names)
    task = ClassifierTask(model, examples, config.shift, config.train.label_smoothing)
    run.train(task, config.train, _Callbacks(task, held_out, folder, world), config.images.max_unreadable)
    if not world.main:
        return {}
    plot_log(
        folder,
        task.name,
        {
            "nats": {"training": "loss", "validation": "validation_loss"},
            "accuracy": {"training": "accuracy", "validation": "validation_accuracy"},
        },
    )
    return run.read_last("validation_loss")


class _Callbacks(MainProcessCallbacks):
    def __init__(self, task: ClassifierTask, held_out: Examples, folder: Path, world: World):
        super().__init__(folder, world)
        self.task, self.held_out = task, held_out

    def measure_model(self) -> Values:
        return {f"validation_{name}": value for name, value in measure_classifier(self.task, self.held_out).items()}

    def write_model(self, folder: Path, step: int) -> None:
        self.task.model.save(folder)


@torch.no_grad()
def measure_classifier(task: ClassifierTask, examples: Examples) -> dict[str, float]:
    """Loss (nats) and accuracy on all examples."""
    sums = {"loss": 0.0, "accuracy": 0.0}
    for batch in read_batches(examples, len(examples), _BATCH, next(task.model.parameters()).device):
        share = len(batch["label"]) / len(examples)
        loss, scalars = task(batch, {}, 0)
        sums["loss"] += share * loss.item()
        sums["accuracy"] += share * scalars["accuracy"].item()
    return sums


def evaluate_classifier(
    folder: Path, data: str, out: Path | None, reading: ReadConfig | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Loss and accuracy of a classifier on all images of `data`; UserError when it has other classes."""
    model = load_classifier(folder).to(find_device(device))
    images = load_test_images(data, model.config.image_size, reading=reading)
    match = match_classes(Classes.of_data(data, images.class_names), Classes.of_data(str(folder), model.class_names))
    match.print_note()
    task = ClassifierTask(model, relabel(images, match).to_examples(), max_shift=0, label_smoothing=0.0)
    values = measure_classifier(task, task.examples)
    if not math.isfinite(values["loss"]):
        raise UserError(f"{folder}: the classifier's cross-entropy is {values['loss']}; its weights are damaged")
    report = {"data": data, "images": len(images), **values, "model_weights": list_digests(folder)}
    if out is not None:
        write_json(out, add_digest(report))
    return report
