"""The training loop, for every task, on one process or many.

All randomness of a step is folded from (seed, task, step), and that of an example from its place in the run, so a run
that was interrupted and resumed ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.parse import to_dict
from nextscale.config.training import TrainConfig
from nextscale.data.examples import check_unreadable
from nextscale.training.engine.guard import stop_requested
from nextscale.training.engine.log import Logger, Stopwatch, Values, open_loggers
from nextscale.training.engine.state import StateFiles, changes, restore
from nextscale.training.engine.step import Stepper
from nextscale.training.engine.task import Task


class Watch(Protocol):
    """What happens whenever a state is saved, with the averaged weights in place when there are any.

    All processes call both, at the same steps.
    """

    def measure(self, step: int) -> Values:
        """What is measured on held-out data after this many steps.

        The smallest "validation_loss" is the best; "unreadable" lists the names of examples that cannot be read.
        """

    def keep(self, step: int, best: bool) -> None:
        """Write the model as it is; `best`: it is the best so far."""


@dataclass
class Interrupted(Exception):
    """Training was asked to stop; the state is saved."""

    task: str
    step: int
    steps: int


def fit(
    task: Task,
    config: TrainConfig,
    folder: Path,
    watch: Watch | None = None,
    *,
    world: World | None = None,
    settings: dict[str, Any] | None = None,
    accept_changes: bool = False,
    max_unreadable: float = 0.1,
) -> None:
    """Train `task` as `config` says, from where a state in `folder` left off.

    `settings` is what a resumed run is compared with (default: `config`); UserError names what has changed, unless
    `accept_changes`.

    Progress goes to the screen and to `folder`/log.jsonl. Ctrl-C or SIGTERM ends the step at hand, saves, and raises
    Interrupted; a second Ctrl-C does not wait. Raises UserError also when loss or gradient are not finite, when too
    many examples are unreadable, or when a process that reads them has died.
    """
    run = _Run(Stepper(task, config, world or World()), folder, watch, settings or to_dict(config), accept_changes)
    stepper, learner = run.stepper, run.stepper.learner
    task.train()
    with run.progress() as bar, stop_requested() as stopping:
        portions = stepper.portions()
        while learner.step < stepper.steps:
            # ---- one step
            try:
                finite = stepper.gradients(portions)
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = _worker_death(error, config.workers)
                if not reason:
                    raise
                run.save()  # the weights are those of the last whole step
                raise UserError(f"{reason}; the state after step {learner.step} is saved in {folder}") from error
            stop, broken = stepper.world.any(stopping.is_set(), not finite)
            if broken:
                raise stepper.complaint(next(iter(run.files.steps()), None))
            stepper.update()
            check_unreadable(list(stepper.unreadable), len(task.examples), max_unreadable)
            # ---- then the rare events
            done, at_end = learner.step, learner.step == stepper.steps
            run.speed.count += config.batch_size
            if done % config.log_every == 0 or at_end:
                bar.set_postfix(run.log(), refresh=False)
            bar.update()
            with run.speed.paused():
                if done % config.save_every == 0 or at_end:
                    run.watch()
                if done % config.save_every == 0 or at_end or stop:
                    run.save()
            if stop:
                raise Interrupted(task.name, done, stepper.steps)
    run.close()
    task.eval()


def _worker_death(error: Exception, workers: int) -> str:
    """How a process that reads examples ended, or nothing when it is not what this error is about.

    torch has no type of its own for it; and a death amid the handing over of a batch breaks the connection instead.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return text.splitlines()[0]
    if workers and not isinstance(error, RuntimeError):
        return f"a DataLoader worker died while it handed over a batch ({type(error).__name__})"
    return ""


def fit_run(
    task: Task,
    config: TrainConfig,
    folder: Path,
    watch: Watch,
    world: World,
    settings: dict[str, Any],
    unreadable: float,
) -> None:
    """`fit` for a run whose settings `check_run` has compared with run.json, which may be newer than the last state.

    `unreadable`: largest share of unreadable examples.
    """
    fit(
        task, config, folder, watch,
        world=world, settings=settings, accept_changes=True, max_unreadable=unreadable,
    )  # fmt: skip


class _Run:
    """What surrounds the steps of a run: its states, its log, its watching."""

    def __init__(
        self, stepper: Stepper, folder: Path, watch: Watch | None, settings: dict[str, Any], accept_changes: bool
    ):
        self.stepper, self.config, self.settings, self.watcher = stepper, stepper.config, settings, watch
        task, world = stepper.task, stepper.world
        self.files = StateFiles(folder, task.name, self.config.keep, world)
        found = self.files.read()
        if found:
            changed = changes(found[0]["settings"], settings)
            if changed and not accept_changes:
                raise UserError(f"{found[1]} belongs to a run with other settings: {'; '.join(changed)}")
            restore(stepper.learner, *found)
        self.loggers: list[Logger] = []
        if world.main:
            self.loggers = open_loggers(folder, task.name, self.config.loggers, stepper.learner.step, settings)
        self.speed = Stopwatch()
        self.unreadable = folder / "unreadable.txt"
        self.named: set[str] = set()

    def progress(self) -> tqdm:
        """The bar on the screen, with steps per second and the time left."""
        task, learner = self.stepper.task, self.stepper.learner
        return tqdm(
            total=self.stepper.steps,
            initial=learner.step,
            desc=f"training the {task.name}",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants few lines
            disable=not self.stepper.world.main,
        )

    def write(self, values: Values) -> None:
        """Log values of the steps done so far."""
        for logger in self.loggers:
            logger.write(self.stepper.learner.step, values)

    def log(self) -> dict[str, str]:
        """Log the last step; the numbers worth showing beside the bar."""
        rate, values = self.speed.read(), self.stepper.values()
        shown = {n: f"{v:.3f}" for n, v in values.items() if isinstance(v, float)}
        speed = {"images_per_s": round(rate, 1), "tokens_per_s": round(rate * self.stepper.task.tokens_per_example)}
        self.write({**values, "learning_rate": self.stepper.rate, **speed})
        self.name_unreadable()
        return shown | {"images/s": f"{rate:.0f}"}

    def name_unreadable(self) -> None:
        """Say which examples could not be read, each once, on the screen and in unreadable.txt."""
        for name in self.stepper.unreadable.keys() - self.named:
            tqdm.write(f"note: passed over {name}")
            with self.unreadable.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            self.named.add(name)

    def watch(self) -> None:
        """Measure the model as it is, with averaged weights where there are any, and keep it."""
        if self.watcher is None:
            return
        learner, world = self.stepper.learner, self.stepper.world
        learner.module.eval()
        with learner.ema.applied() if learner.ema else nullcontext():
            values = dict(self.watcher.measure(learner.step))
            self.stepper.unreadable.update(dict.fromkeys(values.pop("unreadable", ())))
            loss = values.get("validation_loss")
            (best,) = world.any(world.main and isinstance(loss, float) and self.files.note_best(learner.step, loss))
            self.watcher.keep(learner.step, best)
        learner.module.train()
        self.write(values)
        self.name_unreadable()

    def save(self) -> None:
        """Write the state."""
        self.files.save(self.stepper.learner, self.settings)

    def close(self) -> None:
        """End the logs."""
        for logger in self.loggers:
            logger.close()
