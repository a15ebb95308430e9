"""The stages of `nextscale sparsify`: functions from checkpoint to checkpoint, which also return what they measured.

A stage that trains keeps its states in a folder of its own and is resumed from there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.migrate import ADDED, list_version_1_settings
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.inputs import compare_inputs
from nextscale.common.reading import read_json
from nextscale.config.parse import check_fields, read_record, to_dict
from nextscale.config.sparsify import SparsifyConfig, Stage
from nextscale.config.training import TrainConfig
from nextscale.data.examples import Examples
from nextscale.pipeline import Pipeline
from nextscale.sampling.thresholds import interpolate_tau
from nextscale.sparsify.calibrate import Batches, Calibration, calibrate_thresholds
from nextscale.sparsify.convert import check_dense, replace_dynamic, replace_gelu, split_ffns
from nextscale.sparsify.data import Data, load_token_batches
from nextscale.sparsify.report import list_grid, list_table
from nextscale.sparsify.tasks import AdaptTask, RouterTask, TuneTask, list_ffns
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.log import Values
from nextscale.training.engine.loop import Callbacks
from nextscale.training.engine.task import Task
from nextscale.training.open_run import Run
from nextscale.training.validation import validate
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.thresholds import Thresholds

_VALIDATION_IMAGES = 500

Result = tuple[Checkpoint, dict[str, Any]]
"""The checkpoint after a stage, and what the stage measured, for sparsify.json."""


@dataclass(frozen=True)
class Job:
    """What all stages share."""

    config: SparsifyConfig
    data: Data | None
    """None where no stage needs data."""
    folder: Path
    world: World
    accept_changes: bool
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the model's tokenizer, which all stages keep."""

    def list_inputs(self, others: dict[str, Any]) -> dict[str, Any]:
        """What a stage that trains depends on besides its settings, which name only the data."""
        return {**self.examples.inputs, "tokenizer": self.tokenizer, **others}

    @property
    def examples(self) -> Data:
        """The data."""
        assert self.data is not None, "sparsify opens data for the stages that need them"
        return self.data

    def load_pipeline(self, checkpoint: Checkpoint, train: TrainConfig) -> Pipeline:
        """The checkpoint's modules for training: in float32, on this process's device, with `train`'s backend."""
        device, backend = self.world.device, train.backend
        return Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=device, backend=backend)

    def load_batches(self, examples: Examples, pipeline: Pipeline) -> Batches:
        """As many examples as calibration uses, in batches."""
        return load_token_batches(examples, pipeline, self.config.calibration_images, self.config.batch_size)


@dataclass(frozen=True)
class _Thresholds:
    """tau.json: the thresholds that a model is adapted to."""

    about: dict[str, Any]
    """What they were calibrated for."""
    tau: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields("thresholds", self, {"tau must list numbers of 0 to 1": all(0 <= t <= 1 for t in self.tau)})


def tune_model(job: Job, checkpoint: Checkpoint) -> Result:
    """Put ReLU in place of GELU and train towards few active hidden units."""
    config = job.config
    if config.tune == "none":
        return checkpoint, {"tuned": "nothing"}
    start = replace_gelu(checkpoint, config.scales, config.tune == "late")
    pipeline = job.load_pipeline(start, config.tuning)
    task = TuneTask(pipeline.transformer, pipeline.tokenizer, job.examples.train, config.tuning, config.hoyer)
    settings = {
        "tune": config.tune, "hoyer": config.hoyer, "train": to_dict(config.tuning),
        "from": _compute_fingerprint(checkpoint), "data": job.examples.name,
    }  # fmt: skip
    values = _train(job, "tune", task, config.tuning, settings, {"scales": config.scales})
    return _save_model(job, "tune", start, task.model), values


def split_experts(job: Job, checkpoint: Checkpoint) -> Result:
    """Divide the FFNs into experts."""
    config, folder = job.config, job.folder / "split"
    settings = {
        "from": _compute_fingerprint(checkpoint), "expert_size": config.expert_size, "scales": config.scales,
        "router_width": config.router_width, "seed": config.seed, "tokenizer": job.tokenizer,
    }  # fmt: skip
    finished = folder / "finished.json"
    if job.world.main and not (finished.exists() and read_json(finished) == settings):
        finished.unlink(missing_ok=True)
        after = split_ffns(checkpoint, config.expert_size, config.scales, config.router_width, config.seed)
        write_checkpoint(folder, after)
        write_json(finished, settings)
    job.world.wait()
    after = read_checkpoint(folder)
    dynamic = check_dense(after).dynamic
    return after, {"experts": dynamic.experts, "expert_size": config.expert_size, "sparse_scales": dynamic.scales}


def train_routers(job: Job, checkpoint: Checkpoint) -> Result:
    """Train the routers to predict the norms of the experts' outputs."""
    config = job.config
    pipeline = job.load_pipeline(checkpoint, config.routers)
    task = RouterTask(pipeline.transformer, pipeline.tokenizer, job.examples.train, config.routers)
    settings = {"from": _compute_fingerprint(checkpoint), "data": job.examples.name, "train": to_dict(config.routers)}
    values = _train(job, "routers", task, config.routers, settings)
    _measure_importance(job, pipeline)
    return _save_model(job, "routers", checkpoint, pipeline.transformer), values


@torch.no_grad()
def _measure_importance(job: Job, pipeline: Pipeline) -> None:
    """Set how much each hidden unit contributes at the sparse scales, and its mean activation, for static pruning."""
    model, sums, images = pipeline.transformer, list[Tensor](), 0
    thresholds = Thresholds((1.0,) * len(model.pyramid), record="contribution")
    for values, tokens_BL in job.load_batches(job.examples.train, pipeline):
        inputs_BLC = pipeline.tokenizer.teacher_inputs(tokens_BL).repeat(2, 1, 1)
        output = model(model.condition.add_unconditional(values), inputs_BLC, thresholds=thresholds)
        found = collect(output.records, "contribution")
        both = [torch.stack([record.contribution_F, record.activation_F]) for record in found]
        sums = [a + b for a, b in zip(sums, both, strict=True)] if sums else both
        images += len(tokens_BL)
    for ffn, sum_2F in zip(list_ffns(model), sums, strict=True):
        ffn.importance_F.copy_(sum_2F[0] / images)
        ffn.activation_F.copy_(sum_2F[1] / images)


def adapt_model(job: Job, checkpoint: Checkpoint) -> Result:
    """Train the model with only the experts that run at `budget`."""
    config, tau_file = job.config, job.folder / "adapt" / "tau.json"
    about = {"from": _compute_fingerprint(checkpoint), "data": job.examples.name, "budget": config.budget}
    settings = {**about, "train": to_dict(config.adapting)}
    inputs = {"calibration_images": config.calibration_images}
    run = Run(job.folder / "adapt", settings, job.world)
    run.check_settings(job.accept_changes)  # before the long calibration
    run.check_inputs(job.list_inputs(inputs), job.accept_changes)
    if job.world.main:
        about["inputs"] = job.list_inputs(inputs)
        if not tau_file.exists() or compare_inputs(read_record(_Thresholds, tau_file).about, about).changed:
            calibration, _ = _calibrate(job, checkpoint, [config.budget])
            write_json(tau_file, add_digest({"about": about, "tau": list(calibration.table[-1].tau)}))
    job.world.wait()
    tau = read_record(_Thresholds, tau_file).tau
    pipeline = job.load_pipeline(checkpoint, config.adapting)
    model = pipeline.transformer
    thresholds = Thresholds.create(model.config, len(model.pyramid), tau, "threshold")
    task = AdaptTask(model, pipeline.tokenizer, job.examples.train, config.adapting, thresholds)
    values = _train(job, "adapt", task, config.adapting, settings, inputs)
    return _save_model(job, "adapt", checkpoint, model), {**values, "tau": tau}


def find_thresholds(job: Job, checkpoint: Checkpoint) -> Result:
    """Calibrate the thresholds for all budgets, and store them in the checkpoint."""
    config = job.config
    shares = sorted({*config.budgets, *([config.budget] if config.budget else [])}, reverse=True)
    calibration, images = _calibrate(job, checkpoint, shares)
    table = calibration.table
    record = {
        "calibrated_on": job.examples.name, "images": images,
        "budgets": [{"share": row.share, "tau": list(row.tau)} for row in table],
    }  # fmt: skip
    tau = interpolate_tau({"dynamic": record}, max(config.budget, table[-1].share)) if config.budget else ()
    after = replace_dynamic(checkpoint, dataclasses.replace(check_dense(checkpoint).dynamic, tau=tau))
    after.origin["dynamic"] = record
    return after, {
        **record, "tau": list(tau), "budget": config.budget,
        "grid": list_grid(after.config, calibration), "table": list_table(after.config, calibration),
    }  # fmt: skip


def _calibrate(job: Job, checkpoint: Checkpoint, shares: Sequence[float]) -> tuple[Calibration, int]:
    """Thresholds for these shares of the dense FLOPs, and the number of held-out images that they were measured on."""
    pipeline = Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=job.world.device).optimize()
    batches = job.load_batches(job.examples.held_out, pipeline)
    images = sum(len(tokens_BL) for _, tokens_BL in batches)
    calibration = calibrate_thresholds(checkpoint.config, pipeline.tokenizer, pipeline.transformer, batches, shares)
    return calibration, images


STAGES: dict[Stage, Callable[[Job, Checkpoint], Result]] = {
    "tune": tune_model,
    "split": split_experts,
    "routers": train_routers,
    "adapt": adapt_model,
    "thresholds": find_thresholds,
}


# ---- shared by the stages that train


class _Callbacks(Callbacks):
    """Validation at every save; the weights are written when a stage is done."""

    def __init__(self, task: Task, data: Data, world: World):
        self.task, self.data, self.world = task, data, world

    def validate(self, step: int) -> Values:
        return validate(self.task, self.data.held_out, _VALIDATION_IMAGES, self.world)


def _train(
    job: Job, name: Stage, task: Task, config: TrainConfig, settings: dict[str, Any],
    inputs: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a stage's task from where it left off; return its last validation.

    `inputs`: what the stage depends on besides its settings and what all stages depend on.
    """
    run = Run(job.folder / name, settings, job.world)
    run.check_settings(job.accept_changes)
    run.record(job.list_inputs(inputs or {}), job.accept_changes)
    run.train(task, config, _Callbacks(task, job.examples, job.world), job.config.images.max_unreadable)
    if not job.world.main:
        return {}
    return {name: v for name, v in run.read_last("validation_loss").items() if name.startswith("validation_")}


def _save_model(job: Job, name: Stage, before: Checkpoint, model: nn.Module) -> Checkpoint:
    """Write a trained model to the stage's folder, and read it back: of several processes only the first has all
    weights."""
    weights, dynamic = gather_weights(model), check_dense(before).dynamic
    if job.world.main:
        if name in ("routers", "adapt"):
            fingerprint = compute_router_fingerprint(weights, check_dense(before))
            dynamic = dataclasses.replace(dynamic, router_fingerprint=fingerprint, tau=())
        after = dataclasses.replace(replace_dynamic(before, dynamic), transformer=weights)
        write_checkpoint(job.folder / name, after)
    job.world.wait()
    return read_checkpoint(job.folder / name)


def _compute_fingerprint(checkpoint: Checkpoint) -> str:
    """Fingerprint of a checkpoint's config and of a sample of its transformer's weights.

    Stage folders store it. The config is in the form of version 1, so that stages of that version are recognized.
    """
    samples = {
        name: t.flatten()[:: max(1, t.numel() // 1000)]
        for name, t in checkpoint.transformer.items()
        if not name.endswith(ADDED)
    }
    settings = list_version_1_settings(checkpoint.config, checkpoint.transformer)
    return compute_fingerprint(samples, json.dumps(settings, sort_keys=True))[:16]
