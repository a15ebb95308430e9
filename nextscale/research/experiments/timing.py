"""A limit to the time of a call, the seconds that the parts of an experiment took, and what is left of it."""

from __future__ import annotations

import _thread
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nextscale.common.digest import add_digest
from nextscale.common.files import write_json
from nextscale.config.parse import check_fields, read_record
from nextscale.training.engine.checks import Interrupted
from nextscale.training.engine.progress import format_duration

_FILE = "seconds.json"
DIVERGED = "diverged.json"
"""In the folder of a training that came to values that are not finite."""


class TimeLimit(Exception):
    """The time of a call is over; what was being done is saved."""


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Interrupt what is done inside like Ctrl-C after this many seconds, 0 = never; raises TimeLimit then.

    A training answers by saving its state. To be used in the main thread, which alone can be interrupted.
    """
    if not seconds:
        yield
        return
    over = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a script ignore it

    def interrupt() -> None:
        over.set()
        if hasattr(signal, "pthread_kill"):  # also ends what waits
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if not over.is_set():
            raise
        raise TimeLimit from stop
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


@dataclass(frozen=True)
class Seconds:
    """What was spent on a training, and on measuring the rows that use it; sums over all calls."""

    training: float = 0.0
    measuring: dict[str, float] = field(default_factory=dict)
    """By `Experiment.name_measuring`; there when the row is measured."""

    def __post_init__(self) -> None:
        values = [self.training, *self.measuring.values()]
        check_fields("seconds", self, {"training and measuring must be 0 or more": all(v >= 0 for v in values)})


def read_seconds(folder: Path) -> Seconds:
    """The record in a training's folder; zeros where there is none."""
    path = folder / _FILE
    return read_record(Seconds, path) if path.exists() else Seconds()


def write_seconds(folder: Path, seconds: Seconds) -> None:
    """Write the record into a training's folder."""
    write_json(folder / _FILE, add_digest({"training": seconds.training, "measuring": seconds.measuring}))


@contextmanager
def record_training(folder: Path, *, main: bool) -> Iterator[None]:
    """Add the time spent inside, also if it is interrupted, to the record of a training's folder. `main`: whether this
    process writes it."""
    start = time.monotonic()
    try:
        yield
    finally:
        if main and folder.is_dir():
            before = read_seconds(folder)
            write_seconds(folder, Seconds(before.training + time.monotonic() - start, before.measuring))


@contextmanager
def record_measuring(folder: Path, name: str, *, main: bool) -> Iterator[None]:
    """Note in the record of a training's folder that the row `name` is measured, and the time spent inside."""
    start = time.monotonic()
    yield
    if main:
        before = read_seconds(folder)
        spent = max(time.monotonic() - start, before.measuring.get(name, 0.0))  # nothing is measured a second time
        write_seconds(folder, Seconds(before.training, before.measuring | {name: spent}))


@dataclass(frozen=True)
class Job:
    """A row with a seed: a training, and measurements of it."""

    row: str
    folder: Path
    """Of its training."""
    measured: str = ""
    """The name under which its measurements are recorded; empty = it is trained only, to choose settings."""
    known: bool = True
    """False where settings are yet to be chosen: the folder only tells which jobs share a training."""


def describe_progress(jobs: Sequence[Job]) -> str:
    """What is done of an experiment, what is left, and how long that takes if it takes as long as what is done.

    A job that is left is estimated by the mean of its row, else by the mean of all rows. Other work on the machine
    changes both.
    """
    trainings: dict[tuple[Path, bool], Job] = {}
    for job in jobs:
        trainings.setdefault((job.folder, job.known), job)
    records = {job.folder: read_seconds(job.folder) for job in jobs if job.known}
    done = {place: job for place, job in trainings.items() if _is_finished(job)}
    measured = [job for job in jobs if _is_finished(job) and job.measured in records[job.folder].measuring]
    to_measure = [job for job in jobs if job.measured]
    text = f"{len(done)} of {len(trainings)} trainings are done"
    if to_measure:
        text += f", {len(measured)} of {len(to_measure)} models are measured"
    if len(done) == len(trainings) and len(measured) == len(to_measure):
        return text
    spent = [(job.row, records[job.folder].training) for job in done.values() if records[job.folder].training]
    if not spent:
        return f"{text}; the time left is not known before a training is finished"
    measuring = [(job.row, records[job.folder].measuring[job.measured]) for job in measured]
    total = 0.0
    for place, job in trainings.items():
        if place not in done:
            begun = records[job.folder].training if job.known else 0.0
            total += max(_estimate(job.row, spent) - begun, 0.0)
    total += sum(_estimate(job.row, measuring) for job in to_measure if job not in measured)
    return f"{text}; {format_duration(total)} left, by the time of what is done"


def _is_finished(job: Job) -> bool:
    return job.known and any((job.folder / name).exists() for name in ("finished.json", DIVERGED))


def _estimate(row: str, spent: Sequence[tuple[str, float]]) -> float:
    """The mean of the row's seconds, else of all rows; 0 where there are none."""
    own = [seconds for name, seconds in spent if name == row] or [seconds for _, seconds in spent]
    return statistics.fmean(own) if own else 0.0
