"""`nextscale sparsify`: from a trained model to dynamic experts, stage by stage, each of which can be resumed.

OUT/stages/tune/, split/, routers/, adapt/     what each stage made: a checkpoint, finished.json; run.json, log.jsonl
OUT/stages/samples/                    the model's own samples, where no data are given
OUT/                                   the result, sparsify.json and sparsify.png
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.checkpoints.checkpoint import Checkpoint
from nextscale.checkpoints.native import read_checkpoint, write_checkpoint
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import read_json, write_json
from nextscale.common.plots import plot_curves
from nextscale.config.parse import to_dict
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.training import TrainConfig
from nextscale.pipeline import Pipeline
from nextscale.sampling.thresholds import interpolate_tau
from nextscale.sparsify.calibrate import GRID, Point, calibrate
from nextscale.sparsify.convert import check_identity, identity, model_of, relufied, split, with_dynamic
from nextscale.sparsify.data import Data, batches_of, open_data
from nextscale.sparsify.task import AdaptTask, RouterTask, TuneTask, layers
from nextscale.training.engine.log import Values
from nextscale.training.engine.loop import fit_run
from nextscale.training.engine.parallel import whole_weights
from nextscale.training.engine.state import check_run
from nextscale.training.engine.task import Task
from nextscale.training.transformer_run import validate
from nextscale.transformer.feed_forward.records import UnitContribution, recorded
from nextscale.transformer.feed_forward.thresholds import Thresholds

_VALIDATION = 500


@dataclass(frozen=True)
class _Job:
    """What every stage needs."""

    config: SparsifyConfig
    folder: Path
    world: World
    accept_changes: bool

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name


def sparsify(
    source: Path, out: Path, config: SparsifyConfig, world: World, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Do the stages of `config` on the checkpoint in `source`; write the result to `out`, a checkpoint as any other.

    A stage that is finished with the same settings is not done again, one that was interrupted goes on where it
    stopped. Returns what sparsify.json holds. Raises UserError for a model that the first stage cannot work on, naming
    what differs from an earlier run in `out` unless `accept_changes`.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"--out must be another folder than the model's, {source}")
    job = _Job(config, out, world, accept_changes)
    checkpoint = read_checkpoint(source)
    _check_start(checkpoint, config)
    data = open_data(source, checkpoint, config, out / "stages" / "samples", world) if _needs_data(config) else None
    report: dict[str, Any] = {"source": str(source), "settings": to_dict(config), "stages": {}}
    for number, name in enumerate(config.stages, start=1):
        if world.main:
            print(f"== {name} ({number} of {len(config.stages)})", flush=True)
        checkpoint, found = _STAGES[name](job, checkpoint, data)
        report["stages"][name] = found
    if world.main:
        write_checkpoint(out, checkpoint)
        write_json(out / "sparsify.json", report)
        _draw(report, out / "sparsify.png")
    world.wait()
    return report


def _needs_data(config: SparsifyConfig) -> bool:
    return bool(set(config.stages) - {"split"} - ({"tune"} if config.tune == "none" else set()))


def _check_start(checkpoint: Checkpoint, config: SparsifyConfig) -> None:
    """Raise UserError when the first stage cannot work on this model, before anything is done."""
    dynamic, first = model_of(checkpoint).dynamic, config.stages[0]
    if first in ("routers", "adapt", "thresholds") and not dynamic.experts:
        raise UserError(f"stage {first} needs a model whose FFNs are divided; begin with --stages split {first}")
    if first in ("adapt", "thresholds") and not dynamic.identity:
        raise UserError(f"stage {first} needs trained routers; begin with --stages routers {first}")
    if first in ("adapt", "thresholds"):
        check_identity("this model", checkpoint)
    if first in ("tune", "split") and dynamic.experts:
        raise UserError(f"this model's FFNs are divided already, into {dynamic.experts} experts")
    if first == "tune" and config.tune != "none":
        relufied(checkpoint, config.scales, config.tune == "late")
    width = model_of(checkpoint).ffn_width
    if {"tune", "split"} & {first} and "split" in config.stages and width % min(config.expert_size, width + 1):
        split(checkpoint, config.expert_size, config.scales, config.router_width)  # says what is wrong


# ---- the stages


def _tune(job: _Job, checkpoint: Checkpoint, data: Data | None) -> tuple[Checkpoint, dict[str, Any]]:
    config = job.config
    if config.tune == "none":
        return checkpoint, {"tuned": "nothing"}
    assert data is not None, "tuning was given data"
    start = relufied(checkpoint, config.scales, config.tune == "late")
    pipeline = Pipeline.from_checkpoint(start, dtype=torch.float32, device=job.world.device)
    task = TuneTask(pipeline.transformer, pipeline.tokenizer, data.train, config.tuning, config.hoyer)
    settings = {"tune": config.tune, "hoyer": config.hoyer, "train": to_dict(config.tuning)}
    values = _train(job, "tune", task, config.tuning, data, {**settings, "from": _mark(checkpoint), "data": data.name})
    return _after(job, "tune", start, task.model), values


def _split(job: _Job, checkpoint: Checkpoint, data: Data | None) -> tuple[Checkpoint, dict[str, Any]]:
    config, folder = job.config, job.stage("split")
    settings = {
        "from": _mark(checkpoint), "expert_size": config.expert_size, "scales": config.scales,
        "router_width": config.router_width, "seed": config.seed,
    }  # fmt: skip
    note = folder / "finished.json"
    if job.world.main and not (note.exists() and read_json(note) == settings):
        note.unlink(missing_ok=True)
        divided = split(checkpoint, config.expert_size, config.scales, config.router_width, config.seed)
        write_checkpoint(folder, divided)
        write_json(note, settings)
    job.world.wait()
    divided = read_checkpoint(folder)
    dynamic = model_of(divided).dynamic
    return divided, {"experts": dynamic.experts, "expert_size": config.expert_size, "sparse_scales": dynamic.scales}


def _routers(job: _Job, checkpoint: Checkpoint, data: Data | None) -> tuple[Checkpoint, dict[str, Any]]:
    assert data is not None, "routers were given data"
    config = job.config
    pipeline = Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=job.world.device)
    task = RouterTask(pipeline.transformer, pipeline.tokenizer, data.train, config.routers)
    settings = {"from": _mark(checkpoint), "data": data.name, "train": to_dict(config.routers)}
    values = _train(job, "routers", task, config.routers, data, settings)
    _note_importance(job, pipeline, data)
    return _after(job, "routers", checkpoint, pipeline.transformer), values


@torch.no_grad()
def _note_importance(job: _Job, pipeline: Pipeline, data: Data) -> None:
    """How much each hidden unit contributes at the sparse scales, what static pruning goes by."""
    model, sums, images = pipeline.transformer, list[Tensor](), 0
    thresholds = Thresholds((1.0,) * len(model.pyramid), record="contribution")
    for label_B, tokens_BL in _calibration(job.config, pipeline, data, held_out=False):
        inputs_BLC = pipeline.tokenizer.teacher_inputs(tokens_BL).repeat(2, 1, 1)
        output = model(model.condition.with_none(label_B), inputs_BLC, thresholds=thresholds)
        found = [record.contribution_F for record in recorded(output.records, UnitContribution)]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        images += len(label_B)
    for layer, total_F in zip(layers(model), sums, strict=True):
        layer.importance_F.copy_(total_F / images)


def _adapt(job: _Job, checkpoint: Checkpoint, data: Data | None) -> tuple[Checkpoint, dict[str, Any]]:
    """The model learns to do with the experts that run at the budget, where it is without this stage."""
    assert data is not None, "adapting was given data"
    config, kept = job.config, job.stage("adapt") / "tau.json"
    settings = {
        "from": _mark(checkpoint), "data": data.name, "budget": config.budget, "train": to_dict(config.adapting)
    }  # fmt: skip
    check_run(job.stage("adapt"), settings, job.accept_changes)  # before thresholds are calibrated
    about = {name: settings[name] for name in ("from", "data", "budget")}
    if job.world.main and not (kept.exists() and read_json(kept)["about"] == about):
        packed = Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=job.world.device).pack()
        batches = _calibration(config, packed, data, held_out=True)
        table, *_ = calibrate(checkpoint.config, packed.tokenizer, packed.transformer, batches, [config.budget])
        write_json(kept, {"about": about, "tau": table[-1].tau})
    job.world.wait()
    pipeline = Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=job.world.device)
    model, tau = pipeline.transformer, tuple(read_json(kept)["tau"])
    thresholds = Thresholds.create(model.config, len(model.pyramid), tau, "threshold")
    task = AdaptTask(model, pipeline.tokenizer, data.train, config.adapting, thresholds)
    values = _train(job, "adapt", task, config.adapting, data, settings)
    return _after(job, "adapt", checkpoint, model), {**values, "tau": tau}


def _thresholds(job: _Job, checkpoint: Checkpoint, data: Data | None) -> tuple[Checkpoint, dict[str, Any]]:
    assert data is not None, "thresholds were given data"
    config, dynamic = job.config, model_of(checkpoint).dynamic
    pipeline = Pipeline.from_checkpoint(checkpoint, dtype=torch.float32, device=job.world.device).pack()
    batches = _calibration(config, pipeline, data, held_out=True)
    shares = sorted({*config.budgets, *([config.budget] if config.budget else [])}, reverse=True)
    table, points, verified = calibrate(
        checkpoint.config, pipeline.tokenizer, pipeline.transformer, batches, shares
    )  # fmt: skip
    images = sum(len(labels) for labels, _ in batches)
    record = {
        "calibrated_on": data.name, "images": images,
        "budgets": [{"share": row.share, "tau": list(row.tau)} for row in table],
    }  # fmt: skip
    tau: tuple[float, ...] = ()
    if config.budget:
        reached = max(config.budget, table[-1].share)
        tau = interpolate_tau({"dynamic": record}, reached)
    out = with_dynamic(checkpoint, dataclasses.replace(dynamic, tau=tau))
    out.origin["dynamic"] = record
    found = {
        **record, "tau": list(tau), "budget": config.budget,
        "grid": [_row(out, (t,), p) for t, p in zip(GRID, points, strict=True)],
        "table": [_row(out, row.tau, p) for row, p in zip(table[1:], verified, strict=True)],
    }  # fmt: skip
    return out, found


_STAGES = {"tune": _tune, "split": _split, "routers": _routers, "adapt": _adapt, "thresholds": _thresholds}


# ---- what they share


class _Watch:
    """Validation at every save; the weights are written when a stage is done."""

    def __init__(self, task: Task, data: Data, world: World):
        self.task, self.data, self.world = task, data, world

    def measure(self, step: int) -> Values:
        return validate(cast(Any, self.task), self.data.held_out, _VALIDATION, self.world)

    def keep(self, step: int, best: bool) -> None:
        pass


def _train(
    job: _Job, name: str, task: Task, train: TrainConfig, data: Data, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train a stage's task from where it left off; what its last validation measured."""
    folder = job.stage(name)
    check_run(folder, settings, job.accept_changes)
    job.world.wait()  # all have looked before one writes
    if job.world.main:
        steps, warmup = train.schedule_steps(len(task.examples))
        print(f"{steps:,} steps of {train.batch_size} images, {warmup:,} of them warm-up", flush=True)
        write_json(folder / "run.json", settings)
    watch = _Watch(task, data, job.world)
    fit_run(task, train, folder, watch, job.world, settings, job.config.images.max_unreadable)
    task.eval()
    values = validate(cast(Any, task), data.held_out, _VALIDATION, job.world)
    values.pop("unreadable", None)
    return dict(values)


def _after(job: _Job, name: str, before: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with a trained model's weights, read back from the stage's folder."""
    weights, dynamic = whole_weights(model), model_of(before).dynamic  # of several processes the first alone has them
    if job.world.main:
        if name in ("routers", "adapt"):
            dynamic = dataclasses.replace(dynamic, identity=identity(weights, model_of(before)), tau=())
        after = dataclasses.replace(with_dynamic(before, dynamic), transformer=weights)
        write_checkpoint(job.stage(name), after)
    job.world.wait()
    return read_checkpoint(job.stage(name))


def _calibration(config: SparsifyConfig, pipeline: Pipeline, data: Data, held_out: bool) -> list[tuple[Tensor, Tensor]]:
    examples = data.held_out if held_out else data.train
    return batches_of(examples, pipeline.tokenizer, config.calibration_images, config.batch_size)


def _mark(checkpoint: Checkpoint) -> str:
    """A checksum of a checkpoint's config and of a sample of its transformer's weights."""
    digest = hashlib.sha256(json.dumps(to_dict(checkpoint.config), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.transformer.items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1000)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _row(checkpoint: Checkpoint, tau: tuple[float, ...], point: Point) -> dict[str, Any]:
    counts = checkpoint.config.pyramid.counts
    nats = sum(n * c for n, c in zip(point.nats_K, counts, strict=True)) / sum(counts)
    return {
        "tau": list(tau), "share": point.share(checkpoint.config), "nats_per_token": nats,
        "kl_per_token": sum(point.kl_K) / sum(counts), "kl_per_scale": list(point.kl_K),
        "active_per_scale": list(point.active_K), "agreement_per_scale": list(point.agreement_K),
    }  # fmt: skip


def _draw(report: dict[str, Any], path: Path) -> None:
    """What a smaller share of FLOPs costs, with one threshold for all scales and by the table."""
    found = report["stages"].get("thresholds")
    if not found:
        return
    panels: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    for name, title in (("kl_per_token", "divergence, nats per token"), ("nats_per_token", "cross-entropy")):
        panels[title] = {
            line: [(100 * row["share"], row[name]) for row in sorted(found[rows], key=lambda r: r["share"])]
            for line, rows in (("one threshold", "grid"), ("a threshold per scale", "table"))
        }
    plot_curves(panels, path, x_name="% of the dense model's FLOPs")


def summary(report: dict[str, Any], out: Path) -> str:
    """The report for people."""
    lines, stages = [f"done: {out}"], report["stages"]
    if "validation_loss" in stages.get("tune", {}):
        tuned = stages["tune"]
        lines.append(
            f"tuned: held-out cross-entropy {tuned['validation_loss']:.3f} nats per token, "
            f"{tuned['validation_zeros']:.1%} of the hidden units are 0"
        )
    if "adapt" in stages:
        lines.append(
            f"adapted: held-out cross-entropy {stages['adapt']['validation_loss']:.3f} with a part of the experts"
        )
    if "split" in stages:
        lines.append("{experts} experts of {expert_size}, at the last {sparse_scales} scales".format(**stages["split"]))
    if "routers" in stages:
        found = stages["routers"]
        lines.append(
            f"routers: relative squared error {found['validation_relative_error']:.3f}, "
            f"{found['validation_recall']:.1%} of each token's larger half of experts found"
        )
    if "thresholds" in stages:
        found = stages["thresholds"]
        lines.append(f"thresholds, on {found['images']} held-out images ({found['calibrated_on']}):")
        lines.append("  FLOPs    divergence   cross-entropy   tau")
        for row in found["table"]:
            taus = ",".join(f"{t:.4f}" for t in row["tau"])
            lines.append(f"  {row['share']:>6.1%}{row['kl_per_token']:>12.4f}{row['nats_per_token']:>15.3f}   {taus}")
        lines.append(
            f"turn it down: nextscale sample {out} --labels 0 --budget {found['budget'] or 0.8:g} --out grid.png"
        )
    return "\n".join(lines)
