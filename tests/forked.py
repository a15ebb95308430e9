"""Processes that start at once: they are forked from one that has imported torch and the library already.

They are real processes, to be stopped and killed; but what depends on how Python starts, such as imports and options of
the interpreter, needs `subprocess`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    # DDP and FSDP2 import torch._dynamo; the rest is what training and its pictures import late
    ["tests.process_worker", "torch._dynamo", "nextscale.cli.training", "nextscale.training.report", "tyro",
     "nextscale.transformer.attention", "nextscale.transformer.mamba", "matplotlib.backends.backend_agg",
     "matplotlib.figure"]
)  # fmt: skip


@dataclass
class Forked:
    """A process and the files that it prints to."""

    process: BaseProcess
    out: Path
    err: Path

    def end(self, seconds: float = 240) -> tuple[int | None, str, str]:
        """Wait for its end: (exit status or -signal, standard output, standard error). Killed when it takes longer."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self.out.read_text(), self.err.read_text()

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def kill(self, signal: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None, "it was started"
        os.kill(self.process.pid, signal)


def start(function: Callable[..., int | None], *arguments: Any, files: Path, **environment: str) -> Forked:
    """Begin `function(*arguments)`, whose result is the exit status, in a new process that prints to `files`.out, .err.

    `function` belongs to a module. `environment`: what is changed there, before the function is called.
    """
    with contextlib.chdir(ROOT):  # whence the tests are imported
        forkserver.ensure_running()
    out, err = files.with_suffix(".out"), files.with_suffix(".err")
    process = _CONTEXT.Process(target=_run, args=(function, arguments, out, err, environment))
    process.start()
    return Forked(process, out, err)


def start_all(count: int, function: Callable[..., int | None], *arguments: Any, files: Path) -> list[Forked]:
    """The same in `count` processes that know one another, as those of torchrun do."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port())}
    return [
        start(function, *arguments, files=files.with_name(f"{files.name}-{rank}"),
              **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(count)
    ]  # fmt: skip


def find_port() -> int:
    """A free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run(function: Callable[..., int | None], arguments: tuple, out: Path, err: Path, environment: dict) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    faulthandler.enable()
    os.environ |= environment
    multiprocessing.set_start_method(None, force=True)  # data workers start as everywhere, not by this server
    status = 1
    try:
        status = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
