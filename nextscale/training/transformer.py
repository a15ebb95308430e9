"""`nextscale train` and `nextscale resume`: train a transformer on tokens, from images or a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends import optimize
from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.lora import read_adapter, write_adapter
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.devices import copy_to
from nextscale.common.digest import add_digest, check_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_grid
from nextscale.common.precision import compute_exactly
from nextscale.common.reading import read_json
from nextscale.config.condition import OTHERS
from nextscale.config.migrate import rename_settings
from nextscale.config.parse import parse_record, to_dict
from nextscale.config.training import TrainConfig
from nextscale.config.transformer_training import LossConfig, RunConfig, SizesConfig
from nextscale.data.cache import CachedExamples
from nextscale.data.examples import Batch, Examples
from nextscale.data.sizes import name_pyramids
from nextscale.encoders.patches import PatchEncoder
from nextscale.evaluation.metrics.frequencies import frequency_loss
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import sample_images
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit
from nextscale.training.components import Components, load_components
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.log import Values
from nextscale.training.engine.loop import Callbacks
from nextscale.training.engine.task import Task
from nextscale.training.inputs import read_batch
from nextscale.training.lengths import LENGTH, average_lengths, average_scales, check_lengths, choose_length
from nextscale.training.open_run import (
    LogName,
    Run,
    keep_best_model,
    list_model_folders,
    plot_log,
    resolve_precision,
)
from nextscale.training.validation import validate
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.balance import average_shares, compute_balance_loss, compute_expert_load
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.projector import compute_alignment_loss, parse_scale_group
from nextscale.transformer.var import VAR, Output

_SAMPLES_PER_CLASS, _SHOWN_CLASSES = 8, 10


@dataclass(frozen=True)
class FrozenNetworks:
    """Networks that compute the inputs and targets of a task and are not trained.

    A task holds them in this dataclass because `nn.Module` would make them submodules: moved, sharded and switched to
    training with the task. They must be on the task's device.
    """

    tokenizer: Tokenizer
    encoder: PatchEncoder | None = None
    """The encoder of semantic guidance, where the examples hold no features."""


class TransformerTask(Task):
    """Cross-entropy of the tokens of all scales, given condition and coarser scales (MEPA Eq. 4-5), with the losses of
    mixtures of experts (Eq. 10) and of semantic guidance (Eq. 12-13) where the model has them.

    Batches hold the condition's values (`Condition.from_batch`), such as `label`, and either `tokens` (B, L), from a
    cache, or `image` (uint8), which is encoded first. The targets of guidance are the batch's `features` (B, h, w, E),
    or else those of `frozen.encoder`. Batches of `SizedExamples` say their size under `size`.
    """

    name = "transformer"
    thresholds: Thresholds | None = None
    """Of dynamic experts, where a subclass sets them; without them all experts run."""

    def __init__(
        self,
        model: VAR,
        tokenizer: Tokenizer,
        examples: Examples,
        config: TrainConfig,
        loss: LossConfig | None = None,
        encoder: PatchEncoder | None = None,
        saves_frozen: bool = True,
        sizes: SizesConfig | None = None,
    ):
        super().__init__()
        self.model, self.config, self.loss = model, config, loss or LossConfig()
        self.frozen = FrozenNetworks(tokenizer, encoder)
        self.examples, self.trained, self.saves_frozen = examples, model, saves_frozen
        self.sizes = sizes or SizesConfig()
        self.pyramids = self.sizes.list_pyramids(model.pyramid)
        self.names = name_pyramids(self.pyramids)
        self.tokens_per_example = sum(pyramid.length for pyramid in self.pyramids) // len(self.pyramids)
        if model.config.experts.router != "none" and self.loss.balance_over == "batch":
            self.waits_in_forward = True
            self.micro_batch_matters = "the load-balance loss is that of all images computed at once"
        self.leaves_parameters_unused = model.projector is not None and not self.loss.encoder
        guided = {pyramid: self.list_guided(pyramid) for pyramid in self.pyramids}
        if self.sizes.drop:
            check_lengths(self.sizes, guided)

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        drop_B = self.model.condition.draw_drop(count, self.config.label_drop, rng)
        drop_path = draw_drop_path(self.model, count, self.config.drop_path, rng)
        noise = {"drop": drop_B} if drop_path is None else {"drop": drop_B, "drop_path": drop_path}
        return noise | ({LENGTH: torch.rand((), generator=rng).expand(count)} if self.sizes.drop else {})

    def list_guided(self, pyramid: Pyramid) -> tuple[int, ...]:
        """The scales of semantic guidance."""
        return parse_scale_group(self.loss.group, len(pyramid)) if self.loss.encoder else ()

    def check_batch(self, batch: Batch) -> None:
        if "tokens" in batch:
            pyramid = self.pyramids[int(batch["size"][0])] if "size" in batch else self.model.pyramid
            self.frozen.tokenizer.at(pyramid).check_tokens(batch["tokens"])

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        several, kept = "size" in batch, noise.get(LENGTH)  # a GPU waits once for each
        pyramid = self.pyramids[int(batch["size"][0])] if several else self.model.pyramid
        scales = len(pyramid) if kept is None else choose_length(self.sizes, len(pyramid), float(kept[0]))
        part = Pyramid(pyramid.sides[:scales]) if scales < len(pyramid) else pyramid
        model, length = self.model.at(pyramid), pyramid.spans[scales - 1][1]
        tokens_BL, inputs_BLC = read_batch(batch, self.frozen.tokenizer.at(pyramid))
        tokens_BL, inputs_BLC = tokens_BL[:, :length], inputs_BLC[:, : length - pyramid.counts[0]]
        values = model.condition.from_batch(batch)
        values = model.condition.drop(noise["drop"], values) if noise else values
        drop_path = noise["drop_path"].permute(1, 2, 0) if "drop_path" in noise else None
        guided = max(self.list_guided(pyramid), default=-1) + 1
        output = model(
            values, inputs_BLC, drop_path=drop_path, aligned_scales=guided, thresholds=self.thresholds, scales=scales
        )
        smoothing = self.config.label_smoothing if noise else 0.0
        nats_R = F.cross_entropy(
            output.logits_BNV.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=smoothing
        )
        nats_BL, correct_BL = nats_R.view_as(tokens_BL), output.logits_BNV.detach().argmax(-1) == tokens_BL
        loss, others = self.add_losses(nats_BL.mean(), output, batch, pyramid)
        scalars = {
            "cross_entropy": nats_BL.detach().mean(),
            "accuracy": correct_BL.float().mean(),
            "loss_per_scale": average_scales(nats_BL.detach(), part),
            "accuracy_per_scale": average_scales(correct_BL.float(), part),
        }
        if several and noise:
            scalars[f"cross_entropy_at_{self.names[int(batch['size'][0])]}"] = scalars["cross_entropy"]
        if self.sizes.drop:
            scalars |= average_lengths(nats_BL.detach(), pyramid, self.sizes, scales, trained=bool(noise))
        return loss if noise else nats_BL.mean(), scalars | others

    def add_losses(
        self, loss: Tensor, output: Output, batch: Batch, pyramid: Pyramid
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy `loss` with the other losses added, and each of these by name."""
        others: dict[str, Tensor] = {}
        if output.projected_BNE is not None:
            features_BghE = self._get_features(batch, pyramid)
            guidance = compute_alignment_loss(
                output.projected_BNE, features_BghE, pyramid, self.list_guided(pyramid), self.loss.aggregate
            )
            loss = guidance + self.loss.cross_entropy * loss
            others["guidance"] = guidance.detach()
        routings = collect(output.records, "routing")
        if routings:
            idle = self.model.config.experts.zero_computation
            shares: list[Tensor | None] = [None] * len(routings)
            if self.loss.balance_over == "batch":  # in validation processes may compute the same images
                shares = [*average_shares(routings, self.world if self.model.training else World())]
            parts = zip(routings, shares, strict=True)
            balance = sum(compute_balance_loss(r, idle, self.loss.idle_balance, share_M) for r, share_M in parts)
            assert isinstance(balance, Tensor), "a sum of losses"
            loss = loss + self.loss.balance * balance
            others["balance"] = balance.detach() / len(routings)
            others["expert_load"] = torch.stack([compute_expert_load(r.selected_BNM) for r in routings]).mean(dim=0)
        return loss, others

    @torch.no_grad()
    def _get_features(self, batch: Batch, pyramid: Pyramid) -> Tensor:
        """The targets of guidance, (B, h, w, E)."""
        if "features" in batch:
            return batch["features"]
        encoder = self.frozen.encoder
        assert encoder is not None, "load_components gives an encoder where a cache has no features"
        with compute_exactly(batch["image"]):
            return encoder(scale_to_unit(batch["image"]), pyramid.last)

    def fast_modules(self) -> list[nn.Module]:
        return [self.model]

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def explain_missing_gradient(self, name: str) -> str | None:
        if name.endswith(".lora_A"):  # it is multiplied by lora_B, which is 0 at first
            return ""
        return "no token of the batch was sent to them" if name.endswith(".experts") else None

    def describe_faulty_scales(self, scalars: dict[str, Any]) -> str:
        finite = scalars["loss_per_scale"].isfinite().tolist()
        if len(finite) != len(self.model.pyramid) or len(self.pyramids) > 1:
            return f"scales {', '.join(str(k) for k, good in enumerate(finite, 1) if not good)} of its size"
        sides = [f"{h}x{w}" for (h, w), good in zip(self.model.pyramid.sides, finite, strict=True) if not good]
        return "all scales" if not any(finite) else f"scale {', '.join(sides)}" if sides else ""


def draw_drop_path(model: VAR, batch: int, rate: float, rng: torch.Generator) -> Tensor | None:
    """Stochastic depth (B, blocks, S): 0 where a branch is dropped, else 1 / keep probability. None when off."""
    if rate == 0:
        return None
    depth, layers = len(model.blocks), max(len(block.layers) for block in model.blocks)
    keep_D1 = 1 - torch.linspace(0, rate, depth).view(-1, 1)
    return (torch.rand(batch, depth, layers, generator=rng) < keep_D1) / keep_D1


def train_transformer(
    config: RunConfig, folder: Path, world: World, *, extend: bool = False, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a generator into `folder`, which `nextscale sample` takes; return its last validation.

    Beside the checkpoint: best/ (lowest validation loss), samples.png, curves.png, log.jsonl, run.json, training/. An
    unfinished run in `folder` is resumed; a finished one is refused unless `extend`, which allows more steps. Raises
    UserError naming what differs from an earlier run's settings and inputs, unless `accept_changes`.
    """
    config = resolve_precision(config.complete(), folder, world)
    run = Run(folder, to_dict(config), world)
    run.check_settings(accept_changes, free=("train.steps", "train.epochs") if extend else ())
    if (folder / "finished.json").exists() and not extend:
        raise UserError(
            f"the run in {folder} is finished; choose another --out, or give --extend and more --train.steps"
        )
    run.check_needs(config.train)
    components = load_components(config, world, folder)
    run.record(components.list_inputs(config), accept_changes)
    if world.main:
        (folder / "finished.json").unlink(missing_ok=True)
    tokenizer = components.tokenizer.to(world.device)
    optimize(tokenizer, config.train.backend)
    components = components.add_model_samples(config, folder, world)
    task = TransformerTask(
        components.transformer, tokenizer, components.examples, config.train, config.loss, components.encoder,
        saves_frozen=components.adapters is None, sizes=config.sizes,
    )  # fmt: skip
    run.train(task, config.train, _Callbacks(config, components, task, run), config.images.max_unreadable)
    if not world.main:
        return {}
    if config.train.patience:
        _keep_best(config, components, run)
    record = run.read_best() if config.train.patience else run.read_last("validation_loss")
    values = {n: v for n, v in record.items() if n.startswith("validation_")}
    _plot_curves(folder, components.model.pyramid)
    values |= _compute_frequency_loss(components)
    write_json(folder / "finished.json", add_digest({"settings": to_dict(config), **values}))
    return values


_OTHER_RUNS = {"codebook": "tokenizer train", "classifier": "classifier train", "moco": "encoder train"}
"""Commands whose runs have a run.json of their own, by a table that only it has."""


def read_run_config(folder: Path) -> RunConfig:
    """The settings of the run in `folder`."""
    path = folder / "run.json"
    if (folder / "quickstart.json").is_file() and not path.is_file():
        raise UserError(
            f"{folder} is a quickstart's: resume it with `nextscale quickstart --config {folder}/quickstart.json --out "
            f"{folder}`. To train its model further: `nextscale train CONFIG --start {folder} --data DATA --out OTHER`"
        )
    if (folder / "stages").is_dir() and not path.is_file():
        raise UserError(f"{folder} is that of `nextscale sparsify`: run the same command again to resume it")
    if not path.is_file():
        raise UserError(f"{folder} holds no run: it has no run.json")
    raw = read_json(path)
    record = rename_settings(raw)
    for name, command in _OTHER_RUNS.items():
        if isinstance(record, dict) and name in record:
            raise UserError(f"{folder} is a run of `nextscale {command}`: run the same command again to resume it")
    fields = {name: value for name, value in record.items() if name != "digest"} if isinstance(record, dict) else record
    config = parse_record(RunConfig, fields, path)
    check_digest(path, raw)
    return config


def _keep_best(config: RunConfig, components: Components, run: Run) -> None:
    """Let the run's folder have the model of the lowest held-out loss, and its samples."""
    keep_best_model(run.folder)
    if components.adapters is None:
        checkpoint = read_checkpoint(run.folder)
    else:
        checkpoint = components.adapters.merge(read_adapter(run.folder))
    pipeline = Pipeline.from_checkpoint(checkpoint, device=run.world.device, dtype=torch.float32)
    draw_samples(pipeline, config, [run.folder / "samples.png"], components.held_out)


class _Callbacks(Callbacks):
    """At every save: validate, write the model, and draw a grid of samples."""

    def __init__(self, config: RunConfig, components: Components, task: TransformerTask, run: Run):
        self.config, self.components, self.task, self.run = config, components, task, run

    def validate(self, step: int) -> Values:
        return validate(self.task, self.components.held_out, self.config.validation_images, self.run.world)

    def save_model(self, step: int, best: bool) -> None:
        adapters, config = self.components.adapters, self.config
        weights = gather_weights(self.task.model, frozen=adapters is None)
        if not self.run.world.main:
            return
        every = config.train.model_every
        folders = list_model_folders(self.run.folder, best, kept=step if every and step % every == 0 else 0)
        if adapters is None:
            checkpoint = Checkpoint(self.components.model, self.components.tokenizer_weights, weights)
            for folder in folders:
                write_checkpoint(folder, checkpoint)
        else:
            adapter = adapters.take(weights)
            checkpoint = adapters.merge(adapter)
            for folder in folders:
                write_adapter(folder, adapter)
        steps, every = config.train.schedule_steps(len(self.task.examples))[0], config.train.sample_every
        if step == steps or (every and step % every == 0):
            pipeline = Pipeline.from_checkpoint(checkpoint, device=self.run.world.device, dtype=torch.float32)
            names = f"samples/step-{step:08d}.png", "samples.png"
            paths = [self.run.folder / name for name in names]
            draw_samples(pipeline, config, paths, self.components.held_out)


def draw_samples(pipeline: Pipeline, config: RunConfig, paths: Sequence[Path], held_out: Examples) -> None:
    """A grid of samples as a file at each path: a row for each of the first classes, or with the conditions of the
    first held-out examples where they have no classes."""
    condition = pipeline.transformer.config.condition
    if condition.kind in OTHERS:
        images = _draw_held_out(pipeline, config, held_out)
        captions = [""] * len(images)
    else:
        classes = range(min(condition.num_classes, _SHOWN_CLASSES))
        drawn = pipeline.sample([c for c in classes for _ in range(_SAMPLES_PER_CLASS)], config.sampling)
        images, captions = drawn.tensor, list(drawn.captions)
    for path in paths:
        save_grid(images, captions, path, columns=_SAMPLES_PER_CLASS)


def _draw_held_out(pipeline: Pipeline, config: RunConfig, held_out: Examples) -> Tensor:
    """Several images with the condition of each of the first held-out examples, (B, 3, H, W)."""
    batch = held_out.fetch(range(min(_SHOWN_CLASSES, len(held_out))), None)
    tensors = {name: copy_to(rows, pipeline.device) for name, rows in batch.items() if isinstance(rows, Tensor)}
    values, rows = pipeline.transformer.condition.from_batch(tensors), []
    for i in range(len(values)):
        index = torch.full((_SAMPLES_PER_CLASS,), i, device=pipeline.device)
        sampler = build_sampler(
            pipeline.tokenizer, pipeline.transformer, values[index], config.sampling, first_image=i * _SAMPLES_PER_CLASS
        )
        rows.append(sample_images(sampler).images_B3HW.cpu())
    return torch.cat(rows)


def _plot_curves(folder: Path, pyramid: Pyramid) -> None:
    """Loss over training, and the validation loss of every scale."""
    per_scale: dict[str, LogName] = {
        f"{h}x{w}": ("validation_loss_per_scale", k) for k, (h, w) in enumerate(pyramid.sides)
    }
    panels: dict[str, dict[str, LogName]] = {
        "Loss (nats per token)": {"training": "cross_entropy", "held out": "validation_loss"},
        "Held-out loss by scale (nats per token)": per_scale,
    }
    plot_log(folder, TransformerTask.name, panels)


def _compute_frequency_loss(components: Components) -> Values:
    """The loss of predicting tokens by their frequencies, where all tokens are at hand."""
    examples, held_out = components.examples, components.held_out
    if not isinstance(examples, CachedExamples) or not isinstance(held_out, CachedExamples):
        return {}
    views = examples.tokens_NVL.shape[1]
    classes = max(len(components.model.class_names), 1)  # without classes in the condition all images are of one
    loss = frequency_loss(
        examples.tokens_NVL.flatten(0, 1),
        examples.labels_N.repeat_interleave(views).clamp_max(classes - 1),
        held_out.tokens_NVL[:, 0],
        held_out.labels_N.clamp_max(classes - 1),
        classes,
        components.model.tokenizer.vocab_size,
    )
    return {} if loss is None else {"frequency_loss": loss}
