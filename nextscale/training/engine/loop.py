"""The training loop of every task, on one process or many.

All randomness of a step is derived from (seed, task, step), and that of an example from its position in the run. So a
run that was interrupted and resumed ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nextscale.common.distributed import World
from nextscale.common.rng import make_generator
from nextscale.config.parse import to_dict
from nextscale.config.training import TrainConfig
from nextscale.data.examples import BatchDataset, load_batches
from nextscale.training.engine.checks import (
    Interrupted,
    build_non_finite_error,
    catch_stop_signals,
    is_finite,
    report_missing_gradients,
    report_worker_death,
)
from nextscale.training.engine.distributed import DistributedModel
from nextscale.training.engine.log import RunLog, StepMetrics, Values
from nextscale.training.engine.optimizer import Ema, build_optimizer, set_schedule
from nextscale.training.engine.state import StateFiles, TrainState
from nextscale.training.engine.task import MicroBatch, Task


class Callbacks:
    """What a run does whenever it saves, with the averaged weights in place where there are any.

    All processes call both methods, at the same steps.
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
    UserError when `settings` (default: `config`) differ from the state's, unless `accept_changes`; when loss or
    gradient are not finite; when a data worker has died; when more than the share `max_unreadable` of the examples is
    unreadable.
    """
    world, settings = world or World(), settings or to_dict(config)
    model = DistributedModel(task, config, world)
    optimizer = build_optimizer(task.trained, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
    ema = Ema(task.trained, config.ema) if config.ema else None
    state, files = TrainState(task.trained, optimizer, scaler, ema), StateFiles(folder, task.name, config.keep, world)
    files.resume(state, settings, accept_changes)
    steps, warmup = config.schedule_steps(len(task.examples))
    task.train()
    with RunLog(folder, task, config, world, state.step, settings) as log, catch_stop_signals() as stop_signal:
        reader = MicroBatchReader(task, config, world, state.step, log, save=lambda: files.save(state, settings))
        for step in range(state.step, steps):
            # ---- batch, forward, backward: the gradients of the micro-batches add up
            metrics = StepMetrics()
            for micro_batch in reader.read(step):
                with model.accumulate(micro_batch.last):
                    loss, scalars = model.forward(micro_batch.batch, micro_batch.noise, step)
                    scaler.scale(loss * micro_batch.share).backward()
                metrics.add(loss, scalars, micro_batch.share)
            scaler.unscale_(optimizer)
            gradient_norm = model.compute_gradient_norm()
            stop, broken = world.any(stop_signal.is_set(), not is_finite(metrics.loss, gradient_norm, scaler))
            if broken:
                raise build_non_finite_error(model, micro_batch, metrics.loss, gradient_norm, step, files)
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
            if state.step % config.log_every == 0 or state.step == steps:
                log.log_step(state.step, metrics, gradient_norm, learning_rate)
            with log.pause():
                if save and callbacks:
                    log.log_validation(state.step, validate(model, ema, callbacks, files, state.step))
                if save or stop:
                    files.save(state, settings)
            if stop:
                raise Interrupted(task.name, state.step, steps)
    finish(task, ema)


def finish(task: Task, ema: Ema | None) -> None:
    """Leave a trained task in evaluation mode, with the averaged weights where there are any."""
    if ema:
        ema.write()
    task.eval()


def validate(model: DistributedModel, ema: Ema | None, callbacks: Callbacks, files: StateFiles, step: int) -> Values:
    """Validate the model and save it, with the averaged weights where there are any."""
    trained = model.task.trained
    trained.eval()
    with ema.apply() if ema else nullcontext():
        with model.autocast(validating=True):
            values = callbacks.validate(step)
        callbacks.save_model(step, best=files.record_best(step, values))
    trained.train()
    return values


class MicroBatchReader:
    """The micro-batches of this process from `first_step` on, read ahead by the data workers.

    `save` is called when one of these has died.
    """

    def __init__(
        self, task: Task, config: TrainConfig, world: World, first_step: int, log: RunLog, save: Callable[[], None]
    ):
        self.task, self.config, self.device, self.log, self.save = task, config, world.device, log, save
        self.step, self.rows = first_step, config.split_batch(world.size)[world.rank]
        size, steps = config.batch_size, config.schedule_steps(len(task.examples))[0]
        spans = ((step * size + r.start, step * size + r.stop) for step in range(first_step, steps) for r in self.rows)
        dataset = BatchDataset(task.examples, config.seed, task.name)
        self.batches = load_batches(dataset, spans, config.workers, pin=world.device.type == "cuda")

    def read(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of the next step, which is `step`."""
        config = self.config
        noise = self.task.draw_noise(config.batch_size, make_generator(config.seed, self.task.name, "step", step))
        examples = sum(rows.stop - rows.start for rows in self.rows)
        for rows in self.rows:
            with report_worker_death(config.workers, step, self.log.folder, self.save):
                batch = next(self.batches)
            self.log.note_unreadable(batch.pop("unreadable", ()))
            yield MicroBatch(
                {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()},
                {name: tensor[rows].to(self.device) for name, tensor in noise.items()},
                share=(rows.stop - rows.start) / examples,
                last=rows is self.rows[-1],
            )
