"""`nextscale train` and `nextscale resume`: a generator from images or a token cache to a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.backends import optimize
from nextscale.checkpoints.checkpoint import Checkpoint, build_modules, load_tokenizer
from nextscale.checkpoints.native import read_checkpoint, write_checkpoint
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import read_json, write_json
from nextscale.common.pictures import save_grid
from nextscale.common.plots import plot_curves
from nextscale.common.rng import make_generator
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import CachedExamples, open_examples
from nextscale.data.examples import Examples
from nextscale.encoders.load import load_encoder
from nextscale.encoders.patches import PatchEncoder
from nextscale.evaluation.metrics.frequencies import frequency_loss
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.log import Values, read_log
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.engine.state import check_settings
from nextscale.training.transformer_task import TransformerTask
from nextscale.transformer.initialization import initialize_transformer
from nextscale.transformer.var import VAR

_SAMPLES_PER_CLASS, _SHOWN_CLASSES, _BATCH = 8, 10, 64


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_weights: dict[str, Tensor]
    transformer: VAR
    train: Examples
    held_out: Examples
    encoder: PatchEncoder | None
    """What semantic guidance aims at, where the examples hold no features."""


def train_transformer(
    config: RunConfig, folder: Path, world: World, *, extend: bool = False, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a generator into `folder`, which `nextscale sample` takes; return its last validation.

    Beside the checkpoint: best/ (lowest validation loss), samples.png, curves.png, log.jsonl, run.json, training/. An
    unfinished run in `folder` goes on; a finished one is refused unless `extend`, which allows more steps. Raises
    UserError naming what differs from an earlier run's settings, unless `accept_changes`.
    """
    config = config.complete()
    check_settings(folder, to_dict(config), accept_changes, ("train.steps", "train.epochs") if extend else ())
    if (folder / "finished.json").exists() and not extend:
        raise UserError(
            f"the run in {folder} is finished; choose another --out, or give --extend and more --train.steps"
        )
    parts = open_parts(config, world)
    world.wait()  # all have looked before one writes
    if world.main:
        write_json(folder / "run.json", to_dict(config))
        (folder / "finished.json").unlink(missing_ok=True)
    optimize(parts.tokenizer.to(world.device), config.train.backend)
    task = TransformerTask(parts.transformer, parts.tokenizer, parts.train, config.train, config.loss, parts.encoder)
    callbacks = _Callbacks(config, parts, task, folder, world)
    train(
        task, config.train, folder, callbacks, world=world, settings=to_dict(config),
        accept_changes=True,  # they were compared with run.json, which may be newer than the last state
        max_unreadable=config.images.max_unreadable,
    )  # fmt: skip
    if not world.main:
        return {}
    draw_curves(folder)
    values = _last_validation(folder) | _frequencies(parts)
    write_json(folder / "finished.json", {"settings": to_dict(config), **values})
    return values


def _last_validation(folder: Path) -> Values:
    """What was measured last, in this call or an earlier one."""
    measured = [r for r in read_log(folder / "log.jsonl") if "validation_loss" in r]
    return {n: v for n, v in measured[-1].items() if n.startswith("validation_")} if measured else {}


def _frequencies(parts: Parts) -> Values:
    """The loss of the simplest model of these tokens, where they are all at hand."""
    train, held_out = parts.train, parts.held_out
    if not isinstance(train, CachedExamples) or not isinstance(held_out, CachedExamples):
        return {}
    views = train.tokens_NVL.shape[1]
    loss = frequency_loss(
        train.tokens_NVL.flatten(0, 1),
        train.labels_N.repeat_interleave(views),
        held_out.tokens_NVL[:, 0],
        held_out.labels_N,
        len(parts.model.class_names),
        parts.model.tokenizer.vocab_size,
    )
    return {} if loss is None else {"frequency_loss": loss}


def read_run(folder: Path) -> RunConfig:
    """The settings of the run in `folder`."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no run: it has no run.json")
    return from_dict(RunConfig, read_json(folder / "run.json"), f"{folder}/run.json")


def open_parts(config: RunConfig, world: World) -> Parts:
    """Data, tokenizer and transformer of a run. Raises UserError when they do not belong together."""
    checkpoint = read_checkpoint(Path(config.start or config.tokenizer))
    if config.scales and config.tokenizer:
        checkpoint.config = dataclasses.replace(checkpoint.config, pyramid=Pyramid.parse(config.scales))
    tokenizer = load_tokenizer(checkpoint, checkpoint.config)
    weights = checkpoint.tokenizer | {"quantizer.usage_KV": tokenizer.quantizer.usage_KV}
    train, held_out, names = open_examples(config.data, checkpoint.config, tokenizer, config.images, config.train.seed)
    encoder, width = _target(config, train, world)
    model = _model(config, checkpoint, names, width)
    transformer = _transformer(config, model, checkpoint.transformer)
    if world.main:
        print(f"{config.data}: {len(train)} examples to train on, {len(held_out)} held out; {model.summary()}")
    return Parts(model, tokenizer, weights, transformer, train, held_out, encoder)


def _target(config: RunConfig, train: Examples, world: World) -> tuple[PatchEncoder | None, int]:
    """The encoder of semantic guidance, unless the cache holds its features, and their width; 0 without guidance."""
    name = config.loss.encoder
    if not name:
        return None, 0
    if isinstance(train, CachedExamples):
        if name != "cache":
            raise UserError(
                f"{config.data} is a token cache: features must be in it (make it with `nextscale tokenize --encoder "
                f"{name}`) and are used with --loss.encoder cache"
            )
        if not train.feature_width:
            raise UserError(
                f"{config.data} holds no features: make it anew with `nextscale tokenize --encoder ENCODER`"
            )
        return None, train.feature_width
    if name == "cache":
        raise UserError(f"loss.encoder is 'cache', but {config.data} is no token cache; name an encoder")
    encoder = load_encoder(name).to(world.device)
    return encoder, encoder.width


def _transformer(config: RunConfig, model: ModelConfig, weights: dict[str, Tensor]) -> VAR:
    """The transformer to train: initialised, then with the weights it starts from, if any."""
    _, transformer = build_modules(model)
    assert transformer is not None, "a generator has a transformer"
    initialize_transformer(transformer, config.init, make_generator(config.train.seed, "transformer"))
    if config.start:  # a start without an alignment head gets a new one
        fresh = {n: t for n, t in transformer.state_dict().items() if n.startswith("projector.")}
        transformer.load_state_dict(fresh | {n: t.float() for n, t in weights.items()})
    if transformer.projector is not None:
        transformer.projector.requires_grad_(bool(config.loss.encoder))
    return transformer


def _model(config: RunConfig, checkpoint: Checkpoint, names: tuple[str, ...], width: int) -> ModelConfig:
    """The generator's config: the start checkpoint's, or the run's with the data's classes; with an alignment head for
    features of this width, if there are any."""
    if not config.start:
        transformer: TransformerConfig | None = config.with_classes(len(names), width)
        return dataclasses.replace(checkpoint.config, transformer=transformer, class_names=names)
    transformer = checkpoint.config.transformer
    if transformer is None:
        raise UserError(f"{config.start} is a tokenizer alone: give it as --tokenizer to train a new transformer")
    if transformer.dynamic.identity:
        raise UserError(
            f"{config.start} has routers that were trained for its FFNs, which training would change: train the model "
            "that it was made of, then `nextscale sparsify` that one"
        )
    if transformer.condition.num_classes != len(names):
        raise UserError(
            f"{config.start} knows {transformer.condition.num_classes} classes, {config.data} has {len(names)}: "
            f"carry the model over first with `nextscale adapt {config.start} --classes {len(names)} --out DIR`"
        )
    if width and transformer.alignment.width != width:
        if transformer.alignment.width:
            raise UserError(
                f"the alignment head of {config.start} was trained for features of width "
                f"{transformer.alignment.width}; those of {config.loss.encoder} have {width}"
            )
        head = dataclasses.replace(config.transformer.alignment, width=width)
        return dataclasses.replace(checkpoint.config, transformer=dataclasses.replace(transformer, alignment=head))
    return checkpoint.config


class _Callbacks(Callbacks):
    """What happens at a save: validation, the model files, and sample grids."""

    def __init__(self, config: RunConfig, parts: Parts, task: TransformerTask, folder: Path, world: World):
        self.config, self.parts, self.task, self.folder, self.world = config, parts, task, folder, world

    def validate(self, step: int) -> Values:
        return validate(self.task, self.parts.held_out, self.config.validation_images, self.world)

    def save_model(self, step: int, best: bool) -> None:
        weights = gather_weights(self.task.model)
        if not self.world.main:
            return
        checkpoint = Checkpoint(self.parts.model, self.parts.tokenizer_weights, weights)
        for folder in (self.folder, self.folder / "best") if best else (self.folder,):
            write_checkpoint(folder, checkpoint)
        steps, every = self.config.train.schedule_steps(len(self.parts.train))[0], self.config.train.sample_every
        if step == steps or (every and step % every == 0):
            pipeline = Pipeline.from_checkpoint(checkpoint, device=self.world.device, dtype=torch.float32)
            pipeline.optimize(self.config.train.backend)
            samples = self.folder / "samples"
            for path in (samples / f"step-{step:08d}.png", self.folder / "samples.png"):
                draw_samples(pipeline, self.config, path)


@torch.no_grad()
def validate(task: TransformerTask, held_out: Examples, limit: int, world: World) -> Values:
    """Cross-entropy in nats per token and accuracy on held-out examples, all together and per scale.

    The processes share the work; all must call it.
    """
    count = min(len(held_out), limit)
    starts = list(range(0, count, _BATCH))
    sums: dict[str, Tensor] = {}
    unreadable: list[str] = []
    for turn in range(0, len(starts), world.size):
        mine = turn + world.rank
        start = starts[min(mine, len(starts) - 1)]  # all take part in every turn, some for nothing
        rows = range(start, min(start + _BATCH, count))
        weight = len(rows) / count if mine < len(starts) else 0.0
        batch = held_out.fetch(rows, None)
        unreadable += batch.pop("unreadable", [])
        loss, scalars = task({n: t.to(world.device) for n, t in batch.items()}, {}, 0)
        for name, value in {"loss": loss, **scalars}.items():
            sums[name] = sums.get(name, 0) + value.double() * weight
    values: Values = {f"validation_{name}": world.sum(value).tolist() for name, value in sums.items()}
    return values | {"unreadable": unreadable} if unreadable else values


def draw_samples(pipeline: Pipeline, config: RunConfig, path: Path) -> None:
    """A grid of samples, a row for each of the first classes."""
    classes = range(min(pipeline.transformer.config.condition.num_classes, _SHOWN_CLASSES))
    images = pipeline.sample([c for c in classes for _ in range(_SAMPLES_PER_CLASS)], config.sampling)
    save_grid(images.tensor, images.captions, path, columns=_SAMPLES_PER_CLASS)


def draw_curves(folder: Path) -> None:
    """Loss and accuracy over training, and the validation loss of every scale."""
    log = [r for r in read_log(folder / "log.jsonl") if r["task"] == TransformerTask.name]
    validation = [r for r in log if "validation_loss" in r]
    scales = range(len(validation[-1]["validation_loss_per_scale"])) if validation else ()
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {
        "nats per token": {
            "training": [(r["step"], r["cross_entropy"]) for r in log if "cross_entropy" in r],
            "validation": [(r["step"], r["validation_loss"]) for r in validation],
        },
        "validation, nats per token of each scale": {
            f"scale {k}": [(r["step"], r["validation_loss_per_scale"][k]) for r in validation] for k in scales
        },
    }
    plot_curves({name: {n: p for n, p in lines.items() if p} for name, lines in panels.items()}, folder / "curves.png")
