"""The log of a run: one JSON object per logged step, appended to log.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nextscale.files import write_text


class JsonLog:
    """Appends lines {"task", "step", values...}. Lines past the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, task: str, from_step: int):
        self.path, self.task = path, task
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [r for r in read_log(path) if r["task"] != task or r["step"] <= from_step]
            write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": self.task, "step": step, **values}) + "\n")


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
