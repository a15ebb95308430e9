"""The log of a run, log.jsonl, which `nextscale.training.engine.log` writes: reading it, and whether it shows
overfitting. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.lines import parse_line
from nextscale.common.notes import print_note
from nextscale.config.parse import quote_value

_RISE = 0.05
"""Share of the lowest held-out loss by which it must have risen."""


def read_log(path: Path) -> list[dict]:
    """All complete lines of a log, those of a task in the order of their steps.

    A last line cut short by a crash is left out. Others that are no record, or do not match their checksum, are left
    out and named. Raises UserError when the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    records, broken = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse_line(line))
        except UserError as error:
            if number < len(lines) or not _is_cut_short(line):
                broken.append((number, error))
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        first, fault = broken[0]
        print_note(f"log {path}", f"{path}: line {first}{more} cannot be used and was passed over: {fault}")
    tasks = list(dict.fromkeys(record["task"] for record in records))
    return sorted(records, key=lambda record: (tasks.index(record["task"]), record["step"]))


def _is_cut_short(line: bytes) -> bool:
    """Whether a last line without a line break is the beginning of a record, as a crash leaves it."""
    return b'"crc32"' not in line and b"\0" not in line


def _parse_line(line: bytes) -> dict:
    """A record of the log: its task, its step, and numbers or lists of numbers. UserError when the line is none."""
    record = parse_line(line, "it")
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        raise UserError("it is no record with a task")
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"step is {quote_value(step)}; it must be 0 or more")
    for name, value in record.items():
        numbers = value if isinstance(value, list) else [value]
        if name != "task" and not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise UserError(f"{name} is {quote_value(value)}; it must be a number or a list of numbers")
    return record


@dataclass(frozen=True)
class Overfitting:
    """A validation at which the held-out loss has risen while the training loss fell."""

    best_step: int
    step: int
    held_out: tuple[float, float]
    """The lowest held-out loss, and that at `step`."""
    training: tuple[float, float]
    """Training losses before both."""


def find_overfitting(records: Iterable[Mapping[str, Any]]) -> Overfitting | None:
    """The first validation whose held-out loss is a twentieth above the lowest before, though the training loss fell.

    `records`: those of one task in a log, in order. The training loss is the mean of what was logged since the
    validation before. None where that does not happen.
    """
    best: tuple[int, float, float] | None = None
    logged: list[float] = []
    for record in records:
        if "validation_loss" not in record:
            logged += [record.get("cross_entropy", record["loss"])] if "loss" in record else []
            continue
        loss = record["validation_loss"]
        if not logged:
            continue
        training = sum(logged) / len(logged)
        logged = []
        if best is None or loss < best[1]:
            best = record["step"], loss, training
        elif loss - best[1] > _RISE * abs(best[1]) and training < best[2]:
            return Overfitting(best[0], record["step"], (best[1], loss), (best[2], training))
    return None
