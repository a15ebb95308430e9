"""What is recorded of a model's training: in its run's folder, or in the card of the folder that it came from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from nextscale.cards.model import Kind
from nextscale.common.digest import check_digest
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_bytes
from nextscale.common.reading import read_json
from nextscale.config.log import find_overfitting, read_log
from nextscale.config.migrate import migrate_record
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.data.cache_head import read_cache_head

_TASKS: dict[Kind, str] = {
    "generator": "transformer", "tokenizer": "tokenizer", "classifier": "classifier", "encoder": "encoder",
}  # fmt: skip
_COMMANDS: dict[Kind, str] = {
    "generator": "train", "tokenizer": "tokenizer train", "classifier": "classifier train", "encoder": "encoder train",
}  # fmt: skip
_OWN_KEYS: dict[str, Kind] = {
    "validation_images": "generator", "codebook": "tokenizer", "classifier": "classifier", "moco": "encoder",
}  # fmt: skip
"""The key of run.json that only a run of this kind has."""
_MEASURES = {
    "validation_cross_entropy": "nats per token", "validation_loss": "nats per token", "psnr_db": "dB PSNR",
    "validation_accuracy": "accuracy", "knn_accuracy": "k-NN accuracy",
}  # fmt: skip
"""Values of the log that a card shows, and what they are called."""
_SHOWN: dict[Kind, tuple[str, ...]] = {
    "generator": ("validation_cross_entropy", "validation_loss"), "tokenizer": ("psnr_db",),
    "classifier": ("validation_accuracy",), "encoder": ("knn_accuracy",),
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Facts of a training. Those that nothing records keep their defaults and are left out of the card."""

    command: str = ""
    data: str = ""
    """As it was given; of an absolute path the last name."""
    datasets: tuple[str, ...] = ()
    """Names on the Hugging Face hub."""
    images: int = 0
    views: int = 0
    """How often each image was encoded, in a token cache."""
    augmentation: tuple[str, ...] = ()
    start: str = ""
    """The checkpoint that it began with."""
    steps: int = 0
    planned_steps: int = 0
    batch_size: int = 0
    precision: str = ""
    learning_rate: float = 0.0
    ema: float = 0.0
    """Decay of the average of the weights that is the model."""
    guidance: str = ""
    """Encoder of semantic guidance."""
    seed: int | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    """What was measured on held-out images in training, at `held_out_step`."""
    held_out_step: int = 0
    frequencies: float = 0.0
    """Nats per token of class and position frequencies alone, on the same images."""
    best_step: int = 0
    """The step with the lowest held-out loss, where that rose later while the training loss fell."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Settings of the sample grids that are not the defaults."""
    changed: bool = False
    """The weights are not those that the training left."""

    def to_table(self) -> dict[str, Any]:
        """The facts that are known, as YAML values."""
        default = Training()
        return {f.name: to_dict(v) for f in fields(self) if (v := getattr(self, f.name)) != getattr(default, f.name)}

    @property
    def passes(self) -> float:
        """Passes over the training images; 0 where it is not known."""
        return self.steps * self.batch_size / self.images if self.images else 0.0


def read_training(folder: Path, kind: Kind) -> tuple[Training, list[str]]:
    """What the folder of a run records of the training of its model, and notes on records that cannot be used.

    The folder best/ of a run has the facts of the run, at the best step.
    """
    notes: list[str] = []
    run = folder.parent if folder.name == "best" and not _has_record(folder) else folder
    training = Training()
    for read in (_add_settings, partial(_add_log, best=run != folder), _add_data):
        try:
            training = from_dict(Training, to_dict(read(training, run, kind, notes)), "training")
        except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:  # sound JSON of other content
            notes.append(f"left out of the card: a record in {run} is not what this nextscale writes ({error})")
    return training, notes


def _has_record(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("run.json", "quickstart.json", "sparsify.json", "log.jsonl"))


def _read_table(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON table; empty where there is none, and, with a note, where it is damaged."""
    if not path.is_file():
        return {}
    try:
        table = read_json(path)
        if not isinstance(table, dict):
            raise UserError(f"{path} is no table")
        check_digest(path, table)
    except UserError as error:
        notes.append(f"left out of the card: {error}")
        return {}
    return table


def _add_settings(training: Training, run: Path, kind: Kind, notes: list[str]) -> Training:
    """What run.json, quickstart.json or sparsify.json says, or else `training`."""
    if kind == "generator" and (report := _read_table(run / "sparsify.json", notes)):
        settings = report.get("settings", {})
        return Training(
            "nextscale sparsify", shorten(settings.get("data")), start=shorten(report.get("source")),
            seed=settings.get("seed"),
        )  # fmt: skip
    if kind == "generator" and (settings := migrate_record(_read_table(run / "quickstart.json", notes))):
        settings["train"] = settings.get("train_transformer", {})
        return replace(_convert(settings), command="nextscale quickstart", planned_steps=0)
    settings = migrate_record(_read_table(run / "run.json", notes))
    if any(key in settings and own != kind for key, own in _OWN_KEYS.items()):
        return training  # of another model that lies in the same folder
    return replace(_convert(settings), command=f"nextscale {_COMMANDS[kind]}") if settings else training


def _convert(settings: dict[str, Any]) -> Training:
    """The facts of a record of settings, in the form of `nextscale.config.*_training`."""
    train, images = settings.get("train", {}), settings.get("images", {})
    loss, defaults = settings.get("loss", {}), to_dict(SampleConfig())
    names = {"random_crop": "random crops", "flip": "mirrored at random"}
    return Training(
        data=shorten(settings.get("data")),
        augmentation=tuple(text for name, text in names.items() if images.get(name)),
        start=shorten(settings.get("start")),
        planned_steps=0 if train.get("epochs") else train.get("steps", 0),
        batch_size=train.get("batch_size", 0),
        precision="" if train.get("precision") == "auto" else train.get("precision", ""),
        learning_rate=float(train.get("learning_rate", 0)),
        ema=float(train.get("ema", 0)),
        guidance=shorten(loss.get("encoder")),
        seed=train.get("seed"),
        sampling={n: v for n, v in settings.get("sampling", {}).items() if v != defaults.get(n, v)},
    )


def _add_log(training: Training, run: Path, kind: Kind, notes: list[str], best: bool) -> Training:
    """Steps and held-out figures, from log.jsonl and finished.json."""
    try:
        records = read_log(run / "log.jsonl") if (run / "log.jsonl").is_file() else []
    except UserError as error:
        notes.append(f"left out of the card: {error}")
        return training
    records = [record for record in records if record["task"] == _TASKS[kind]]
    if not records:
        return training
    measured = [record for record in records if any(name in record for name in _SHOWN[kind])]
    lowest = min((r for r in measured if "validation_loss" in r), key=lambda r: r["validation_loss"], default={})
    shown = (lowest if best and lowest else measured[-1]) if measured else {}
    steps = shown.get("step", records[-1]["step"])
    names = [name for name in _SHOWN[kind] if name in shown][:1]
    risen = find_overfitting(records) is not None and lowest["step"] < shown.get("step", 0)
    finished = _read_table(run / "finished.json", notes) if kind == "generator" else {}
    return replace(
        training, steps=steps, held_out={_MEASURES[name]: shown[name] for name in names},
        held_out_step=shown.get("step", 0), best_step=lowest["step"] if risen else 0,
        frequencies=float(finished.get("frequency_loss", 0)),
    )  # fmt: skip


def _add_data(training: Training, run: Path, kind: Kind, notes: list[str]) -> Training:
    """The number of training images, from the note of a state; a name on the hub, from inputs.json; what a token cache
    was made of, if it is still there."""
    states = sorted((run / "training").glob(f"{_TASKS[kind]}-[0-9]*.json"))
    state = _read_table(states[-1], notes) if states else {}
    inputs = _read_table(run / "inputs.json", notes).get("data", {})
    training = replace(training, images=int(state.get("examples", 0)))
    if inputs.get("kind") == "hub":
        training = replace(training, datasets=(str(inputs["where"]),))
    if isinstance(inputs.get("where"), str) and "content" in inputs:
        training = _add_cache(training, Path(inputs["where"]), inputs["content"])
    return training


def _add_cache(training: Training, cache: Path, content: str) -> Training:
    """What a token cache was made of, where the folder still holds the one that the run was trained on."""
    try:
        path = cache / "cache.json"
        if not path.is_file() or fingerprint_bytes(path.read_bytes()) != content:
            return training
        head = read_cache_head(path)
        inputs = _read_table(cache / "inputs.json", [])
    except (UserError, OSError):
        return training
    made, data = head.get("data", ""), inputs.get("data", {})
    converted = _convert({"images": head.get("images", {})})
    return replace(
        training, data=shorten(made) or training.data, images=head["examples"]["train"], views=head["views"],
        augmentation=converted.augmentation,
        datasets=(str(data["where"]),) if data.get("kind") == "hub" else training.datasets,
    )  # fmt: skip


def shorten(where: object) -> str:
    """A path as a card shows it: without the folders of the machine it was on."""
    text = str(where or "")
    path = Path(text)
    return path.name if path.is_absolute() or ".." in path.parts else text.rstrip("/")
