"""The training loop of every task, on one process or many.

All randomness of a step is derived from (seed, task, step), and that of an example from its position in the run. So a
run that was interrupted and resumed ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nextscale.common.devices import copy_to
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.parse import to_dict
from nextscale.config.training import TrainConfig
from nextscale.data.examples import Batch, BatchDataset, load_batches
from nextscale.training.engine.checks import (
    Interrupted,
    catch_stop_signals,
    describe_worker_death,
    is_finite,
    raise_non_finite,
    report_missing_gradients,
)
from nextscale.training.engine.distributed import DistributedModel
from nextscale.training.engine.log import RunLog, StepMetrics, Values
from nextscale.training.engine.memory import resolve_auto, runs_out_with_an_error, try_micro_batch
from nextscale.training.engine.optimizer import Ema, build_optimizer, set_schedule
from nextscale.training.engine.state import StateFiles, TrainState
from nextscale.training.engine.task import MicroBatch, Task


class Callbacks:
    """What a run does whenever it has saved, with the averaged weights in place where there are any.

    All processes call both methods, at the same steps. A run that ends in one of them repeats both when it is resumed.
    """

    def validate(self, step: int) -> Values:
        """Measure the model on held-out examples after this many steps.

        The smallest "validation_loss" is the best; "unreadable" lists the names of examples that cannot be read.
        """
        return {}

    def save_model(self, step: int, best: bool) -> None:
        """Write the model as it is; `best`: its validation loss is the lowest so far."""


def train(
    task: Task, config: TrainConfig, folder: Path, callbacks: Callbacks | None = None, *, world: World | None = None,
    settings: dict[str, Any] | None = None, accept_changes: bool = False, max_unreadable: float = 0.1,
) -> None:  # fmt: skip
    """Train `task` as `config` says, from the latest state in `folder` on; log to the screen and to log.jsonl there.
    At the end the task holds the averaged weights, if `config.ema` is set: those that were validated and saved.

    Ctrl-C or SIGTERM ends the current step, saves, and raises Interrupted; a second Ctrl-C does not wait. Raises
    UserError when `settings` (default: `config`) differ from the state's, unless `accept_changes`; when the loss or a
    gradient is not finite; when a batch or more than the share `max_unreadable` of the examples cannot be read.
    """
    world, settings = world or World(), settings or to_dict(config)
    files = StateFiles(folder, task.name, config.keep, world)
    config, model, state, due, how = prepare(task, config, files, settings, accept_changes)
    optimizer, scaler, ema = state.optimizer, state.scaler, state.ema
    steps, warmup = config.schedule_steps(len(task.examples))
    with (
        RunLog(folder, task, config, world, state.step, settings, due, how) as log,
        catch_stop_signals(world) as signals,
    ):
        if due and callbacks:
            validate(model, ema, callbacks, files, log, state.step)
        reader = MicroBatchReader(task, config, world, state.step, log, save=lambda: files.save(state, settings))
        for step in iterate_steps(state.step, steps, config, files):
            # ---- batch, forward, backward: the gradients of the micro-batches add up
            metrics = StepMetrics()
            for micro_batch in reader.read(step):
                with model.accumulate(micro_batch.last):
                    loss, scalars = model.forward(micro_batch.batch, micro_batch.noise, step)
                    scaler.scale(loss * micro_batch.share).backward()
                metrics.add(loss, scalars, micro_batch.share)
            scaler.unscale_(optimizer)
            gradient_norm = model.compute_gradient_norm()
            stop, broken = world.any(signals.is_set(), not is_finite(metrics.loss, gradient_norm, scaler))
            if broken:
                raise_non_finite(model, micro_batch, metrics.loss, gradient_norm, step, files)
            report_missing_gradients(model, step)
            # ---- clip, step, average
            learning_rate = set_schedule(optimizer, config, step, steps, warmup)
            model.clip_gradients(gradient_norm, config.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            task.after_step(step, make_generator(config.seed, task.name, "after", step), world)
            if ema:
                ema.update()
            state.step = step + 1
            # ---- log, validate, save
            log.count_step(config.batch_size, max_unreadable)
            save = state.step % config.save_every == 0 or state.step == steps
            log.log_step(state.step, metrics, gradient_norm, learning_rate)
            with log.pause():
                if save or stop:
                    files.save(state, settings, unvalidated=save and callbacks is not None)
                if save and callbacks and not stop:
                    validate(model, ema, callbacks, files, log, state.step)
            if stop:
                raise Interrupted(task.name, state.step, steps)
    finish(task, ema)


def iterate_steps(first: int, steps: int, config: TrainConfig, files: StateFiles) -> Iterator[int]:
    """The steps of a run, up to the one before which `config.patience` ends it."""
    for step in range(first, steps):
        if config.patience and files.is_past_best(step, config):
            return
        yield step


def prepare(
    task: Task, config: TrainConfig, files: StateFiles, settings: dict[str, Any], accept_changes: bool
) -> tuple[TrainConfig, DistributedModel, TrainState, bool, str]:
    """What a training starts from: the config with numbers in place of `auto`, the task wrapped and on its device, the
    latest state; whether its model is yet to be validated; and a line on how the run is computed, or an empty text."""
    world, given = files.world, config.micro_batch
    config, how = resolve_auto(task.to(world.device).train(), config, world, files.read_micro_batch())
    model = DistributedModel(task, config, world)
    optimizer = build_optimizer(task.trained, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=model.dtype == torch.float16)
    ema = Ema(task.trained, config.ema) if config.ema else None
    state = TrainState(task.trained, optimizer, scaler, ema, frozen=task.saves_frozen)
    due = files.resume(state, settings, accept_changes)
    left = state.step < config.schedule_steps(len(task.examples))[0]
    if given == "auto" and left and runs_out_with_an_error(world.device):
        config = try_micro_batch(model, config, optimizer, state.step)
    files.computed = {name: int(getattr(config, name)) for name in ("micro_batch", "workers")}
    files.computed["examples"] = len(task.examples)
    return config, model, state, due, how


def finish(task: Task, ema: Ema | None) -> None:
    """Leave a trained task in evaluation mode, with the averaged weights where there are any."""
    if ema:
        ema.write()
    task.eval()


def validate(
    model: DistributedModel, ema: Ema | None, callbacks: Callbacks, files: StateFiles, log: RunLog, step: int
) -> None:
    """Validate the model, whose state is saved, and write it, with the averaged weights where there are any.

    Buffers that this changes are restored: a resumed run, whose state is older, must not differ.
    """
    trained = model.task.trained
    buffers = {name: buffer.clone() for name, buffer in trained.named_buffers()}
    trained.eval()
    with ema.apply() if ema else nullcontext():
        with model.autocast(validating=True):
            values = callbacks.validate(step)
        callbacks.save_model(step, best=files.record_best(step, values))
    for name, buffer in trained.named_buffers():
        buffer.copy_(buffers[name])
    trained.train()
    log.log_validation(step, values)
    files.record_validated(step)


class MicroBatchReader:
    """The micro-batches of this process from `first_step` on, read ahead by the data workers.

    `save`, by all processes, is called when one of them cannot read its batches.
    """

    def __init__(
        self, task: Task, config: TrainConfig, world: World, first_step: int, log: RunLog, save: Callable[[], None]
    ):
        self.task, self.config, self.world, self.log, self.save = task, config, world, log, save
        self.rows = config.split_batch(world.size)[world.rank]
        size, steps = config.batch_size, config.schedule_steps(len(task.examples))[0]
        spans = ((step * size + r.start, step * size + r.stop) for step in range(first_step, steps) for r in self.rows)
        dataset = BatchDataset(task.examples, config.seed, task.name)
        self.workers = 0 if config.workers == "auto" else config.workers
        self.batches = load_batches(dataset, spans, self.workers, pin=world.device.type == "cuda")

    def read(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of the next step, which is `step`.

        Raises UserError in all processes, after saving the state, when one of them cannot read its own.
        """
        batches, fault = self._fetch(step)
        if any(self.world.any(fault is not None)):
            self.save()
            self.world.raise_first(fault)
        yield from self._split(batches, step)

    def _fetch(self, step: int) -> tuple[list[Batch], UserError | None]:
        """The batches of `step`, one for each micro-batch; or why they cannot be read.

        The error is returned, not raised: other processes must hear of it before they wait for this one.
        """
        try:
            batches = [next(self.batches) for _ in self.rows]
            fault = next((batch["fault"] for batch in batches if "fault" in batch), "")
            for batch in batches if not fault else ():
                self.task.check_batch(batch)
        except UserError as error:
            return [], error
        except (RuntimeError, ConnectionError, EOFError) as error:
            batches, fault = [], describe_worker_death(error, self.workers)
            if not fault:
                raise
            fault = f"{fault}; the state after step {step} is saved in {self.log.folder}"
        return batches, UserError(fault) if fault else None

    def _split(self, batches: Sequence[Batch], step: int) -> Iterator[MicroBatch]:
        """The batches of a step on this process's device, with the random numbers of their examples."""
        config, device = self.config, self.world.device
        noise = self.task.draw_noise(config.batch_size, make_generator(config.seed, self.task.name, "step", step))
        examples = sum(rows.stop - rows.start for rows in self.rows)
        for batch, rows in zip(batches, self.rows, strict=True):
            self.log.note_unreadable(batch.pop("unreadable", ()))
            yield MicroBatch(
                {name: copy_to(tensor, device) for name, tensor in batch.items()},
                {name: copy_to(tensor[rows], device) for name, tensor in noise.items()},
                share=(rows.stop - rows.start) / examples,
                last=rows is self.rows[-1],
            )
