"""What a run tells: one JSON object per logged step in log.jsonl, and TensorBoard or Weights & Biases when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nextscale.common.errors import UserError
from nextscale.common.files import write_text

Values = dict[str, Any]
"""Numbers by name; lists of them have one for each scale."""


class Logger(Protocol):
    """Where a run's values go."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class JsonLog:
    """Appends lines {"task", "step", values...}. Lines past the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, task: str, from_step: int):
        self.path, self.task = path, task
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [r for r in read_log(path) if r["task"] != task or r["step"] <= from_step]
            write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def write(self, step: int, values: Values) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": self.task, "step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, task: str, from_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("the tensorboard logger needs tensorboard: pip install 'nextscale[track]'") from None
        self.writer, self.task = SummaryWriter(folder / "tensorboard", purge_step=from_step + 1), task

    def write(self, step: int, values: Values) -> None:
        for name, value in _flat(values).items():
            self.writer.add_scalar(f"{self.task}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run on wandb.ai, or in the run folder when WANDB_MODE=offline."""

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("the wandb logger needs wandb: pip install 'nextscale[track]' wandb") from None
        self.run = wandb.init(dir=str(folder), name=f"{folder.name}-{task}", config=settings)

    def write(self, step: int, values: Values) -> None:
        self.run.log(_flat(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _flat(values: Values) -> dict[str, float]:
    """Values of scales as one number each: loss_per_scale becomes loss_per_scale/0, /1, ..."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def open_loggers(
    folder: Path, task: str, names: Sequence[str], from_step: int, settings: dict[str, Any]
) -> list[Logger]:
    """log.jsonl, and the named ones."""
    loggers: list[Logger] = [JsonLog(folder / "log.jsonl", task, from_step)]
    if "tensorboard" in names:
        loggers.append(TensorBoard(folder, task, from_step))
    if "wandb" in names:
        loggers.append(WeightsAndBiases(folder, task, settings))
    return loggers


def read_log(path: Path) -> list[dict]:
    """All complete lines of a log; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"task", "step"} <= record.keys():
            records.append(record)
    return records


class Stopwatch:
    """Examples per second between readings, without the time of pauses."""

    def __init__(self) -> None:
        self.count, self.since = 0, time.monotonic()

    def read(self) -> float:
        """Examples per second since the last reading."""
        now = time.monotonic()
        rate = self.count / max(now - self.since, 1e-9)
        self.count, self.since = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not counted."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began
