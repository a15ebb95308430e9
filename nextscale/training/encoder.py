"""`nextscale encoder train` and `nextscale encoder evaluate`: an encoder that learns without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints.verify import list_digests
from nextscale.common.devices import find_device
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.precision import compute_exactly
from nextscale.common.rng import fold_seed
from nextscale.config.data import ReadConfig
from nextscale.config.encoder import EncoderConfig, EncoderRunConfig, MocoConfig, ViewConfig
from nextscale.data.classes import Classes, match_classes, relabel
from nextscale.data.examples import Batch, Examples
from nextscale.encoders.load import load_encoder
from nextscale.encoders.patches import PatchEncoder
from nextscale.encoders.self_supervised import SmallEncoder, is_small_encoder
from nextscale.evaluation.metrics.neighbours import NEIGHBOURS, TEMPERATURE, knn_accuracy
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.engine.log import Values
from nextscale.training.engine.task import Task
from nextscale.training.moco import Moco
from nextscale.training.open_run import (
    MainProcessCallbacks,
    load_test_images,
    open_image_run,
    plot_log,
    read_batches,
    resolve_precision,
)
from nextscale.training.views import DRAWS, make_view

_BATCH = 200


class EncoderTask(Task):
    """MoCo v2 on uint8 images. An example's loss depends on itself and on the queue as it was before the step."""

    name = "encoder"

    def __init__(self, encoder: SmallEncoder, examples: Examples, moco: MocoConfig, views: ViewConfig):
        super().__init__()
        self.moco, self.examples, self.views = Moco(encoder, moco), examples, views
        self.trained = self.moco

    @property
    def encoder(self) -> SmallEncoder:
        """The encoder that is trained."""
        return self.moco.query.encoder

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"views": torch.rand(count, 2, DRAWS, generator=rng)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with compute_exactly(batch["image"]):
            query_B3HW, key_B3HW = (make_view(batch["image"], noise["views"][:, i], self.views) for i in range(2))
        loss, accuracy = self.moco(query_B3HW, key_B3HW)
        return loss, {"own_key_nearest": accuracy}

    def discard_step(self) -> None:
        self.moco.discard()

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """Update the queue and the momentum encoder, from the complete batch."""
        self.moco.update(world)


def create_encoder_task(
    config: EncoderConfig, examples: Examples, moco: MocoConfig, views: ViewConfig, seed: int
) -> EncoderTask:
    """The task of training a new encoder; all weights, and the queue's first keys, follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "encoder"))
        return EncoderTask(SmallEncoder(config), examples, moco, views)


def train_encoder(
    config: EncoderRunConfig, data: str, folder: Path, world: World | None = None, *,
    accept_changes: bool = False, untrained: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train an encoder on `data` into `folder`; return its last validation.

    Beside the encoder: curves.png, log.jsonl, run.json. A second call with the same folder resumes an interrupted run.
    Labels are used to measure and for nothing else. `untrained`: write the network with its initial weights. Raises
    UserError and Interrupted as `engine.loop.train` does.
    """
    world = world or World()
    config = resolve_precision(config, folder, world)
    run, examples, held_out, source = open_image_run(
        folder, data, config, config.encoder.image_size, world,
        accept_changes=accept_changes, other_settings={"untrained": untrained},
    )  # fmt: skip
    task = create_encoder_task(config.encoder, examples, config.moco, config.views, config.train.seed)
    callbacks = EncoderCallbacks(task, held_out, len(source.class_names), config.bank, folder, world)
    if untrained:
        values = callbacks.validate(0)
        callbacks.save_model(0, best=False)
        return values
    run.train(task, config.train, callbacks, config.images.max_unreadable)
    if not world.main:
        return {}
    names = {"InfoNCE, nats": "loss", "own key nearest": "own_key_nearest", "held-out k-NN accuracy": "knn_accuracy"}
    plot_log(folder, task.name, {panel: {panel: name} for panel, name in names.items()})
    return run.read_last("knn_accuracy")


class EncoderCallbacks(MainProcessCallbacks):
    """At every save: standardise the features, measure k-NN accuracy, and write the encoder's files."""

    def __init__(self, task: EncoderTask, held_out: Examples, classes: int, bank: int, folder: Path, world: World):
        """`classes`: number of classes; with one class nothing is measured. `bank`: training images, at most, that
        features are standardised on and that held-out images are compared with. `folder`: for the files."""
        super().__init__(folder, world)
        self.task, self.held_out, self.classes, self.bank = task, held_out, classes, bank

    def measure_model(self) -> Values:
        encoder, examples = self.task.encoder, self.task.examples
        unreadable: list[str] = []
        bank = min(self.bank, len(examples))
        batches = read_batches(examples, bank, _BATCH, encoder.mean_3.device, unreadable)
        encoder.compute_statistics(scale_to_unit(batch["image"]) for batch in batches)
        values: Values = {"unreadable": unreadable}
        if self.classes > 1:
            held_out = encode_images(encoder, self.held_out, len(self.held_out), unreadable)
            values["knn_accuracy"] = knn_accuracy(*held_out, *encode_images(encoder, examples, bank, unreadable))
        return values

    def write_model(self, folder: Path, step: int) -> None:
        self.task.encoder.set_steps(step)
        self.task.encoder.save(folder)


def encode_images(
    encoder: PatchEncoder, examples: Examples, count: int, unreadable: list[str]
) -> tuple[Tensor, Tensor]:
    """Features (N, C), means over the encoder's own grid, and labels (N,) of the first `count` examples, on the CPU.

    Names of examples that cannot be read are added to `unreadable`.
    """
    features, labels = [], []
    for batch in read_batches(examples, count, _BATCH, encoder.mean_3.device, unreadable):
        features.append(encoder(scale_to_unit(batch["image"]), encoder.grid).mean(dim=(1, 2)).cpu())
        labels.append(batch["label"].cpu())
    return torch.cat(features), torch.cat(labels)


def evaluate_encoder(
    source: str,
    data: str,
    test: str,
    size: int,
    out: Path | None,
    reading: ReadConfig | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """k-NN accuracy: the class of each image of `test` by the weighted vote of its nearest neighbours in `data`.

    `source`: any encoder that `load_encoder` knows; its feature of an image is the mean over its patches. `size`:
    images are read at this side; 0 = the encoder's own. UserError when the two sets have other classes.
    """
    encoder = load_encoder(source).to(find_device(device))
    test_images, bank_images = (load_test_images(d, size or encoder.size, reading=reading) for d in (test, data))
    bank_classes = Classes.of_data(data, bank_images.class_names)
    match = match_classes(Classes.of_data(test, test_images.class_names), bank_classes)
    match.print_note()
    test_images = relabel(test_images, match)
    samples, labels = encode_images(encoder, test_images.to_examples(), len(test_images), [])
    bank, bank_labels = encode_images(encoder, bank_images.to_examples(), len(bank_images), [])
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
    if is_small_encoder(Path(source)):
        report["model_weights"] = list_digests(Path(source))
    if out is not None:
        write_json(out, add_digest(report))
    return report
