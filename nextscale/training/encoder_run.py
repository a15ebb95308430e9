"""`nextscale encoder train` and `nextscale encoder evaluate`, end to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.plots import plot_curves
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.parse import to_dict
from nextscale.data.datasets import load_images
from nextscale.data.examples import Examples
from nextscale.encoders.load import load_encoder
from nextscale.encoders.patches import PatchEncoder
from nextscale.evaluation.metrics.neighbours import NEIGHBOURS, TEMPERATURE, knn_accuracy
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.encoder_task import EncoderTask, new_encoder_task
from nextscale.training.engine.log import Values, read_log
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.open_run import open_run

_BATCH = 200


def train_encoder(
    config: EncoderRunConfig, data: str, folder: Path, world: World | None = None, *,
    accept_changes: bool = False, untrained: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train an encoder on `data` into `folder`; return what was measured on held-out images last.

    Beside the encoder: curves.png, log.jsonl, run.json. Called again with the same folder it goes on where it stopped.
    Labels are used to measure and for nothing else. `untrained`: write the network as it would start. Raises UserError
    and train.loop.Interrupted as `fit` does.
    """
    world = world or World()
    settings = {"data": data, "untrained": untrained, **to_dict(config)}
    examples, held_out, source = open_run(
        folder, settings, config.encoder.image_size, config.images, config.train.seed, world,
        accept_changes=accept_changes,
    )  # fmt: skip
    task = new_encoder_task(config.encoder, examples, config.moco, config.views, config.train.seed)
    callbacks = EncoderCallbacks(task, held_out, len(source.class_names), config.bank, folder, world)
    if untrained:
        values = callbacks.validate(0)
        callbacks.save_model(0, best=False)
        return values
    train(
        task, config.train, folder, callbacks, world=world, settings=settings,
        accept_changes=True,  # they were compared with run.json, which may be newer than the last state
        max_unreadable=config.images.max_unreadable,
    )  # fmt: skip
    if not world.main:
        return {}
    log = read_log(folder / "log.jsonl")
    panels = {"InfoNCE, nats": "loss", "own key nearest": "own_key_nearest", "held-out k-NN accuracy": "knn_accuracy"}
    points = {panel: [(r["step"], r[key]) for r in log if key in r] for panel, key in panels.items()}
    plot_curves({panel: {panel: line} for panel, line in points.items() if line}, folder / "curves.png")
    return next((r for r in reversed(log) if "knn_accuracy" in r), {})


class EncoderCallbacks(Callbacks):
    """What happens at a save: features are standardised, neighbours vote, and the encoder's files are written."""

    def __init__(self, task: EncoderTask, held_out: Examples, classes: int, bank: int, folder: Path, world: World):
        """`classes`: how many there are; of one alone nothing is measured. `bank`: training images that standardise the
        features and vote, at most. `folder`: for the files."""
        self.task, self.held_out, self.classes, self.bank = task, held_out, classes, bank
        self.folder, self.world = folder, world

    def validate(self, step: int) -> Values:
        if not self.world.main:
            return {}
        encoder = self.task.moco.query.encoder
        unreadable: list[str] = []
        bank = min(self.bank, len(self.task.examples))
        encoder.compute_statistics(image for image, _ in _batches(encoder, self.task.examples, bank, unreadable))
        values: Values = {"unreadable": unreadable}
        if self.classes > 1:
            held_out = pooled(encoder, self.held_out, len(self.held_out), unreadable)
            values["knn_accuracy"] = knn_accuracy(*held_out, *pooled(encoder, self.task.examples, bank, unreadable))
        return values

    def save_model(self, step: int, best: bool) -> None:
        if self.world.main:
            self.task.moco.query.encoder.set_steps(step)
            self.task.moco.query.encoder.save(self.folder)


def pooled(encoder: PatchEncoder, examples: Examples, count: int, unreadable: list[str]) -> tuple[Tensor, Tensor]:
    """Features (N, C) and labels (N,) of the first `count` examples: means over the grid the encoder was made for.

    Names of examples that cannot be read are added to `unreadable`.
    """
    features, labels = [], []
    for image_B3HW, label_B in _batches(encoder, examples, count, unreadable):
        features.append(encoder(image_B3HW, encoder.grid).mean(dim=(1, 2)).cpu())
        labels.append(label_B)
    return torch.cat(features), torch.cat(labels)


def _batches(
    encoder: PatchEncoder, examples: Examples, count: int, unreadable: list[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1] on the encoder's device, and labels."""
    for start in range(0, count, _BATCH):
        batch = examples.fetch(range(start, min(start + _BATCH, count)), None)
        unreadable += batch.get("unreadable", ())
        yield scale_to_unit(batch["image"].to(encoder.mean_3.device)), batch["label"]


def evaluate_encoder(source: str, data: str, test: str, size: int, out: Path | None) -> dict[str, Any]:
    """How many images of `test` the weighted vote of their nearest neighbours in `data` gives its own class.

    `source`: any encoder that `load_encoder` knows; its feature of an image is the mean over its patches. `size`:
    images are read at this side; 0 = the one that the encoder was made for. UserError when the two sets have classes of
    other names.
    """
    encoder = load_encoder(source)
    sets = [load_images(d, size or encoder.size) for d in (test, data)]
    for images in sets:
        images.print_notes()
    names = [images.class_names for images in sets]
    if names[0] != names[1]:
        raise UserError(
            f"{test} has the classes {', '.join(names[0][:5])}, ...; {data} has {', '.join(names[1][:5])}, ..."
        )
    (samples, labels), (bank, bank_labels) = (pooled(encoder, i.to_examples(), len(i), []) for i in sets)
    report = {
        "encoder": source,
        "kind": encoder.kind,
        "fingerprint": encoder.fingerprint(),
        "data": data,
        "data_images": len(bank),
        "test": test,
        "test_images": len(samples),
        "neighbours": NEIGHBOURS,
        "temperature": TEMPERATURE,
        "knn_accuracy": knn_accuracy(samples, labels, bank, bank_labels),
    }
    if out is not None:
        write_json(out, report)
    return report
