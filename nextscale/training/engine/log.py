"""The log of a run: a JSON object per logged step in log.jsonl, a progress bar, TensorBoard or Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.extras import check_extras, import_extra
from nextscale.common.files import write_text
from nextscale.common.lines import format_line
from nextscale.config.log import find_overfitting, read_log
from nextscale.config.training import TrainConfig
from nextscale.data.examples import check_unreadable
from nextscale.training.engine.progress import TimeEstimate, describe_overfitting, print_schedule
from nextscale.training.engine.task import Task

Values = dict[str, Any]
"""Numbers by name; lists of them have one for each scale."""


class Logger(Protocol):
    """A place that values are written to."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class JsonLog:
    """Appends lines {"task", "step", values..., "crc32"}. Lines past the step that a run resumes from are dropped
    first, and so is the validation of that step where it is `repeated`."""

    def __init__(self, path: Path, task: str, from_step: int, repeated: bool = False):
        self.path, self.task = path, task
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [r for r in read_log(path) if r["task"] != task or r["step"] <= from_step]
            if repeated:  # what training logs has a learning rate
                kept = [r for r in kept if r["task"] != task or r["step"] < from_step or "learning_rate" in r]
            write_text(path, "".join(map(format_line, kept)))

    def write(self, step: int, values: Values) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(format_line({"task": self.task, "step": step, **values}))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Do nothing: no file stays open."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, task: str, from_step: int):
        check_loggers(["tensorboard"])
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.task = SummaryWriter(folder / "tensorboard", purge_step=from_step + 1), task

    def write(self, step: int, values: Values) -> None:
        for name, value in _flatten(values).items():
            self.writer.add_scalar(f"{self.task}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run on wandb.ai, or in the run folder when WANDB_MODE=offline."""

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]):
        wandb = import_extra("wandb", "the wandb logger")
        self.run = wandb.init(dir=str(folder), name=f"{folder.name}-{task}", config=settings)

    def write(self, step: int, values: Values) -> None:
        self.run.log(_flatten(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _flatten(values: Values) -> dict[str, float]:
    """One number for each scale: loss_per_scale becomes loss_per_scale/0, /1, ..."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError when the package of one of these loggers cannot be imported."""
    check_extras({name: f"the {name} logger" for name in names})


def open_loggers(
    folder: Path, task: str, names: Sequence[str], from_step: int, settings: dict[str, Any], repeated: bool = False
) -> list[Logger]:
    """log.jsonl, and the named loggers."""
    loggers: list[Logger] = [JsonLog(folder / "log.jsonl", task, from_step, repeated)]
    if "tensorboard" in names:
        loggers.append(TensorBoard(folder, task, from_step))
    if "wandb" in names:
        loggers.append(WeightsAndBiases(folder, task, settings))
    return loggers


class StepMetrics:
    """Loss and scalars of one step, summed over its micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, scalars: dict[str, Tensor], weight: float) -> None:
        """Add a micro-batch, whose weight is its share of this process's examples."""
        for name, value in {"loss": loss.detach(), **scalars}.items():
            self.sums[name] = self.sums.get(name, 0) + value * weight

    @property
    def loss(self) -> Tensor:
        """The loss of this process."""
        return self.sums["loss"]

    def average(self, world: World) -> Values:
        """Means over all processes, as numbers. All of them must call it. The host waits once for all values."""
        means_X = world.sum(torch.cat([value.float().reshape(-1) for value in self.sums.values()])) / world.size
        numbers, averages = iter(means_X.cpu().tolist()), Values()
        for name, value in self.sums.items():
            averages[name] = list(islice(numbers, len(value))) if value.ndim else next(numbers)
        return averages


class RunLog:
    """Progress on the screen and values in the loggers. The main process alone writes."""

    def __init__(
        self, folder: Path, task: Task, config: TrainConfig, world: World, state_step: int, settings: dict[str, Any],
        unvalidated: bool = False, how: str = "",
    ):  # fmt: skip
        """`unvalidated`: the validation of `state_step` is repeated. `how`: how the run is computed, to be printed."""
        self.folder, self.task, self.world, names = folder, task, world, config.loggers
        self.loggers = open_loggers(folder, task.name, names, state_step, settings, unvalidated) if world.main else []
        self.every, (steps, _) = config.log_every, config.schedule_steps(len(task.examples))
        if world.main and state_step < steps:
            print_schedule(task, config, world.size, how)
        self.bar = tqdm(
            total=steps,
            initial=state_step,
            desc=f"training the {task.name}",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file should have few lines
            disable=not world.main,
        )
        self.time = TimeEstimate(steps - state_step)
        self.examples, self.since = 0, time.monotonic()
        self.unreadable: dict[str, None] = dict.fromkeys(task.examples.skipped)
        self._reported: set[str] = set()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        for logger in self.loggers:
            logger.close()

    def count_step(self, examples: int, max_unreadable: float) -> None:
        """Count a step of so many examples. UserError when more than this share of all cannot be read."""
        check_unreadable(list(self.unreadable), len(self.task.examples), max_unreadable)
        self.examples += examples
        self.bar.update()
        estimate = self.time.count_step()
        if estimate and self.world.main:
            tqdm.write(f"training the {self.task.name} takes {estimate} more on this machine")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent in this context out of the examples per second."""
        start = time.monotonic()
        yield
        paused = time.monotonic() - start
        self.since += paused
        self.time.since += paused

    def log_step(self, step: int, metrics: StepMetrics, gradient_norm: Tensor, learning_rate: float) -> None:
        """Log every `log_every`-th step, and the last one. All processes must call it."""
        if step % self.every and step != self.bar.total:
            return
        now = time.monotonic()
        rate = self.examples / max(now - self.since, 1e-9)
        self.examples, self.since = 0, now
        values = metrics.average(self.world) | {"gradient_norm": gradient_norm.item()}
        shown = {n: f"{v:.3f}" for n, v in values.items() if isinstance(v, float)} | {"images/s": f"{rate:.0f}"}
        speed = {"images_per_s": round(rate, 1), "tokens_per_s": round(rate * self.task.tokens_per_example)}
        self._write(step, {**values, "learning_rate": learning_rate, **speed})
        self._report_unreadable()
        self.bar.set_postfix(shown, refresh=False)

    def log_validation(self, step: int, values: Values) -> None:
        """Log what was measured on held-out examples; "unreadable" are names of examples that cannot be read."""
        self.note_unreadable(values.get("unreadable", ()))
        measured = {name: value for name, value in values.items() if name != "unreadable"}
        if measured:
            self._write(step, measured)
        self._report_unreadable()
        if self.world.main and "validation_loss" in measured:
            self._report_overfitting(step)

    def _report_overfitting(self, step: int) -> None:
        """Say once, at the first step where it shows, that the held-out loss rises while the training loss falls."""
        records = [r for r in read_log(self.folder / "log.jsonl") if r["task"] == self.task.name]
        found = find_overfitting(records)
        if found and found.step == step:
            best = self.folder / "best"
            tqdm.write(f"note: {describe_overfitting(found, len(self.task.examples), best if best.is_dir() else None)}")

    def _write(self, step: int, values: Values) -> None:
        for logger in self.loggers:
            logger.write(step, values)

    def note_unreadable(self, names: Iterable[str]) -> None:
        """Remember examples that cannot be read."""
        self.unreadable.update(dict.fromkeys(names))

    def _report_unreadable(self) -> None:
        """Name each unreadable example once, on the screen and in unreadable.txt."""
        for name in self.unreadable.keys() - self._reported:
            tqdm.write(f"note: passed over {name}")
            with (self.folder / "unreadable.txt").open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            self._reported.add(name)
