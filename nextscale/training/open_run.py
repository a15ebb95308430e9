"""What all runs share: the record of their settings, their data, training, and what they write at their end."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nextscale.common.devices import copy_to
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.dtypes import DTYPES, parse_dtype
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.inputs import INPUTS, check_inputs
from nextscale.common.notes import print_note
from nextscale.common.plots import can_plot, note_missing_plot, plot_curves
from nextscale.common.precision import choose_training_dtype, get_name
from nextscale.common.reading import read_json
from nextscale.common.sizes import Size
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.data import ReadConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.log import read_log
from nextscale.config.migrate import migrate_record
from nextscale.config.parse import to_dict
from nextscale.config.tokenizer_training import TokenizerRunConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.datasets import ImageExamples, ImageSet, load_images, open_dataset
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Batch, Examples
from nextscale.data.sources import Source
from nextscale.training.engine.log import Values, check_loggers
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.engine.state import check_settings
from nextscale.training.engine.task import Task

ImageRunConfig = TokenizerRunConfig | ClassifierRunConfig | EncoderRunConfig


C = TypeVar("C", RunConfig, TokenizerRunConfig, ClassifierRunConfig, EncoderRunConfig)


def resolve_precision(config: C, folder: Path, world: World) -> C:
    """The config with a type in place of precision auto: that of the run in the folder, else the fastest here.

    So the record of a run names its type, and the run keeps it on another machine. All processes must call this.
    """
    if config.train.precision != "auto":
        return config
    check_loggers(config.train.loggers)  # an error comes before a note
    path = folder / "run.json"
    before = migrate_record(read_json(path)) if path.is_file() else {}
    train = before.get("train") if isinstance(before, dict) else None
    recorded = train.get("precision") if isinstance(train, dict) else None
    if recorded not in DTYPES or recorded == "auto":
        recorded = get_name(choose_training_dtype("auto", world.device))
        if world.main:
            print_note("precision", f"precision auto: {recorded}")
    (low,) = world.any(recorded == "bfloat16")  # machines may differ
    precision = parse_dtype("bfloat16" if low else recorded)
    return replace(config, train=replace(config.train, precision=precision))


@dataclass(frozen=True)
class Run:
    """A training run in a folder, whose settings are recorded in run.json."""

    folder: Path
    settings: dict[str, Any]
    world: World

    def check_settings(self, accept_changes: bool, free: tuple[str, ...] = ()) -> None:
        """Raise UserError naming what differs from an earlier run in the folder, unless `accept_changes`.

        Settings in `free` may differ.
        """
        check_settings(self.folder, self.settings, accept_changes, free)

    def check_needs(self, config: TrainConfig) -> None:
        """Raise UserError when a logger's package is missing; print a note when the curves will not be drawn."""
        check_loggers(config.loggers)
        if self.world.main:
            note_missing_plot(self.folder / "curves.png", "log.jsonl")

    def check_inputs(self, inputs: Mapping[str, Any], accept_changes: bool) -> None:
        """Raise UserError naming the inputs that changed since the run in the folder began, unless `accept_changes`."""
        advice = "choose another --out, or give --accept-changes to go on with what there is now"
        check_inputs(
            self.folder / INPUTS, inputs, self.folder / "run.json", advice,
            accept=accept_changes, show=self.world.main,
        )  # fmt: skip

    def record(self, inputs: Mapping[str, Any], accept_changes: bool) -> None:
        """Check the inputs, then write inputs.json and run.json. All processes must call this."""
        self.check_inputs(inputs, accept_changes)
        self.world.wait()
        if self.world.main:
            write_json(self.folder / INPUTS, dict(inputs))
            write_json(self.folder / "run.json", add_digest(self.settings))

    def train(self, task: Task, config: TrainConfig, callbacks: Callbacks, max_unreadable: float) -> None:
        """Train `task` from where the run stopped; raises what `engine.loop.train` raises.

        Changes are accepted: settings were compared with run.json, which may be newer than the last state.
        """
        train(
            task, config, self.folder, callbacks, world=self.world, settings=self.settings, accept_changes=True,
            max_unreadable=max_unreadable,
        )  # fmt: skip

    def read_best(self) -> Values:
        """The record of the log with the lowest validation loss; or nothing."""
        records = [record for record in read_log(self.folder / "log.jsonl") if "validation_loss" in record]
        return min(records, key=lambda record: record["validation_loss"], default={})

    def read_last(self, name: str) -> Values:
        """The last record of the log that has this value, written by this call or an earlier one; or nothing."""
        records = read_log(self.folder / "log.jsonl")
        return next((record for record in reversed(records) if name in record), {})


def open_image_run(
    folder: Path, data: str, config: ImageRunConfig, size: Size, world: World, *,
    accept_changes: bool, about: str = "", other_settings: Mapping[str, Any] | None = None,
    other_inputs: Mapping[str, Any] | None = None,
) -> tuple[Run, ImageExamples, ImageExamples, Source]:  # fmt: skip
    """A run that trains on the images of `data`: (run, training examples, held-out examples, source).

    Images are resized and cropped to `size`. `about`: text that is printed beside the number of images; the number of
    classes, if empty. `other_settings` are recorded beside the config, `other_inputs` beside the data. Raises UserError
    naming what differs from an earlier run's settings and inputs, unless `accept_changes`, and as `open_dataset`.
    """
    settings = {"data": data, **(other_settings or {}), **to_dict(config)}
    run = Run(folder, settings, world)
    run.check_settings(accept_changes)
    run.check_needs(config.train)
    examples, held_out, source = open_dataset(data, size, config.images, config.train.seed)
    print_data_set(source.class_names, [examples.labels_B, held_out.labels_B], examples.notes)
    check_data(config, len(examples), len(source.class_names), data)
    run.record({"data": examples.inputs, **(other_inputs or {})}, accept_changes)
    if world.main:
        about = about or f"{len(source.class_names)} classes"
        print(f"{data}: {len(examples)} images to train on, {len(held_out)} held out; {about}")
    return run, examples, held_out, source


def check_data(config: ImageRunConfig, examples: int, classes: int, data: str) -> None:
    """Raise UserError when a run on so many training examples and classes would leave a part of the model untrained."""
    if isinstance(config, TokenizerRunConfig):
        config.check_length(config.train.schedule_steps(examples)[0])
    if isinstance(config, ClassifierRunConfig) and classes < 2:
        raise UserError(
            f"{data} has one class: a classifier would learn nothing; give images of two classes or more, each in a "
            "folder of its own"
        )


class MainProcessCallbacks(Callbacks, ABC):
    """Callbacks of a model that only the main process validates and writes."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world

    def validate(self, step: int) -> Values:
        return self.measure_model() if self.world.main else {}

    def save_model(self, step: int, best: bool) -> None:
        if self.world.main:
            for folder in list_model_folders(self.folder, best):
                self.write_model(folder, step)

    @abstractmethod
    def measure_model(self) -> Values:
        """Measure the model on held-out examples."""

    @abstractmethod
    def write_model(self, folder: Path, step: int) -> None:
        """Write the model's files to a folder."""


def list_model_folders(folder: Path, best: bool, kept: int = 0) -> list[Path]:
    """Where the files of a model are written: the run folder, best/ in it for the best model so far, and a folder of
    its own for the model of a step that is kept (`train.model_every`; 0 = it is not)."""
    return [folder, *([folder / "best"] if best else []), *([folder / name_kept_model(kept)] if kept else [])]


def name_kept_model(step: int) -> str:
    """The folder, in that of a run, of the model that was kept at this step."""
    return f"kept/step-{step:08d}"


def keep_best_model(folder: Path) -> None:
    """Replace the model of a run by that of best/, if there is one."""
    files = [file for file in (folder / "best").glob("*") if file.suffix in (".json", ".safetensors")]
    with write_atomically(*(folder / file.name for file in files)) as drafts:
        for file, draft in zip(files, drafts, strict=True):
            shutil.copyfile(file, draft)


def load_test_images(data: str, size: Size, limit: int = 10**9, reading: ReadConfig | None = None) -> ImageSet:
    """Images of a data set, to evaluate a model on, at most `limit`; notes about them are printed."""
    images = load_images(data, size, limit, config=reading)
    images.print_notes()
    return images


def read_batches(
    examples: Examples, count: int, size: int, device: torch.device, unreadable: list[str] | None = None
) -> Iterator[Batch]:
    """The first `count` examples in batches of `size` on a device, without random changes.

    Names of examples that cannot be read are added to `unreadable`.
    """
    for start in range(0, count, size):
        batch = examples.fetch(range(start, min(start + size, count)), None)
        names = batch.pop("unreadable", ())
        if unreadable is not None:
            unreadable += names
        yield {name: copy_to(tensor, device) for name, tensor in batch.items()}


LogName = str | tuple[str, int]
"""A value of a log: its name, or (name, k) for scale k of a list of values."""


def plot_log(folder: Path, task: str, panels: Mapping[str, Mapping[str, LogName]]) -> None:
    """Write curves.png: values of log.jsonl over the steps, {panel: {line: name}}.

    Lines without points are left out, and so are panels without lines. Without matplotlib nothing is written.
    """
    if not can_plot():
        return
    log = [record for record in read_log(folder / "log.jsonl") if record["task"] == task]
    series = {panel: {line: list_points(log, name) for line, name in lines.items()} for panel, lines in panels.items()}
    series = {panel: {line: points for line, points in lines.items() if points} for panel, lines in series.items()}
    plot_curves({panel: lines for panel, lines in series.items() if lines}, folder / "curves.png")


def list_points(log: list[dict], name: LogName) -> list[tuple[int, float]]:
    """(step, value) of every record that has this value."""
    if isinstance(name, str):
        return [(r["step"], r[name]) for r in log if name in r and not isinstance(r[name], list)]
    key, k = name
    return [(r["step"], r[key][k]) for r in log if isinstance(r.get(key), list) and k < len(r[key])]
