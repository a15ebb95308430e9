"""What a run says about its length, its time, and whether more steps still help."""

from __future__ import annotations

import time
from pathlib import Path

from nextscale.config.log import Overfitting
from nextscale.config.training import TrainConfig
from nextscale.training.engine.task import Task


def print_schedule(task: Task, config: TrainConfig, processes: int, how: str = "") -> None:
    """Print the length of a run, `how` it is computed, and a note for each setting that does not fit it."""
    examples = len(task.examples)
    steps, warmup = config.schedule_steps(examples)
    print(
        f"training the {task.name}: {steps:,} steps of {config.batch_size} images "
        f"({steps * config.batch_size / examples:,.1f} epochs of {examples:,}), {warmup:,} of them warm-up",
        flush=True,
    )
    if how:
        print(f"training the {task.name}: {how}", flush=True)
    for doubt in config.list_schedule_doubts(examples, processes):
        print(f"note: {doubt}", flush=True)


def format_duration(seconds: float) -> str:
    """ "about 40 s", "about 12 min", "about 3.4 h" or "about 2.1 days"."""
    if seconds < 100:
        return f"about {max(seconds, 1):.0f} s"
    if seconds < 100 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"about {seconds / 86400:.1f} days"


class TimeEstimate:
    """The time that a run will take, from its first steps. The very first one is slower and does not count."""

    least_steps, least_seconds = 3, 2.0
    """What is timed before the estimate is given."""
    least_remaining = 30.0
    """Seconds below which no estimate is given."""

    def __init__(self, steps: int):
        """`steps`: those that are left."""
        self.steps, self.done, self.since, self.given = steps, 0, time.monotonic(), False

    def count_step(self) -> str:
        """Count a step; the time of those that are left as text, once it can be told, else an empty text."""
        self.done, now = self.done + 1, time.monotonic()
        if self.done == 1:
            self.since = now
        timed, elapsed = self.done - 1, now - self.since
        if self.given or timed < self.least_steps or elapsed < self.least_seconds:
            return ""
        self.given = True
        remaining = (self.steps - self.done) * elapsed / timed
        return format_duration(remaining) if remaining >= self.least_remaining else ""


def describe_overfitting(found: Overfitting, examples: int, best: Path | None) -> str:
    """What happens, and what to do about it. `best`: folder of the model with the lowest held-out loss."""
    (lowest, loss), (before, after), step = found.held_out, found.training, found.best_step
    text = (
        f"the held-out loss rose from {lowest:.3f} (step {step}) to {loss:.3f} (step {found.step}) while the training "
        f"loss fell from {before:.3f} to {after:.3f}: the model learns its {examples:,} training examples by heart. "
        f"More images help most; else take fewer steps (about {step}), augment (images.flip, images.random_crop, "
        "`nextscale tokenize --views`), or raise weight_decay and drop_path"
    )
    return f"{text}; {best} keeps the model of step {step}" if best else text
