"""Processes of nextscale commands for tests.

    torchrun --nproc-per-node 2 -m tests.process_worker PLAN    each command of the plan, one after the other

PLAN is a JSON file: a list of {"command": "train ...", "mishap": "KIND RANK STEP"}. `by_pairs` does the same with a new
pair of processes for each command, without torchrun, which would end what a process leaves behind. It writes PLAN.said,
a list with {"status": [of each rank], "text": [of each rank], "seconds": s} for each command; "status" is -9 for a
killed process.

A mishap happens to one rank, in the forward pass of a step, or when it encodes or draws a batch of this number: kill
(SIGKILL), stop (SIGTERM), worker (SIGKILL of its data workers), disk (files of 30,000 bytes at most from then on), nan
(its loss is not finite), user (a UserError), bug.
"""

import contextlib
import faulthandler
import io
import itertools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

import nextscale.training.transformer  # noqa: F401
from nextscale.cli.parser import main
from nextscale.common.distributed import init_distributed
from nextscale.common.errors import UserError
from nextscale.data.cache_writer import CacheWriter
from nextscale.evaluation.images import ModelImages
from nextscale.training.engine.distributed import DistributedModel
from tests.forked import find_port

PATIENCE = 60
"""Seconds in which all processes must end after a mishap."""


def run_command(entry: dict) -> int:
    """One command in this process: its exit status."""
    if "mishap" in entry:
        kind, rank, step = entry["mishap"].split()
        if os.environ["RANK"] == rank:
            with arranged(kind, int(step)):
                return main(entry["command"].split())
    return main(entry["command"].split())


@contextlib.contextmanager
def arranged(kind: str, at: int):
    """Something happens in this process at the call of this number."""
    places = [(DistributedModel, "forward"), (CacheWriter, "_encode_batch"), (ModelImages, "fetch")]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    calls = itertools.count()

    def make_broken(before):
        def broken(*arguments):
            found = before(*arguments)
            if next(calls) == at:
                met = meet(kind, found)
                return found if met is None else met
            return found

        return broken

    for place, name, before in kept:
        setattr(place, name, make_broken(before))
    try:
        yield
    finally:
        for place, name, before in kept:
            setattr(place, name, before)


def meet(kind: str, found):
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        case "worker":
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        case "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        case "user":
            raise UserError("the cat sat on the keyboard")
        case "bug":
            raise IndexError("a defect")
        case "nan":
            return found[0] * float("nan"), found[1]


def in_turn(plan: Path) -> None:
    """All commands by the processes that torchrun has started."""
    said = []
    for entry in json.loads(plan.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            status = run_command(entry)
        print(printed.getvalue())
        if status not in (0, 130):
            sys.exit(status)
        said.append({"status": status, "text": printed.getvalue()})
        with init_distributed("cpu") as world:  # what rank 0 still writes is there when the next command begins
            world.wait()
    Path(f"{plan}.{os.environ['RANK']}.said").write_text(json.dumps(said))


def by_pairs(plan: Path) -> None:
    """Each command by two new processes, in the plan's folder."""
    torch.set_num_threads(1)
    os.chdir(plan.parent)
    said = []
    for entry in json.loads(plan.read_text()):
        began, drafts = time.monotonic(), [Path(f"{plan}.text-{rank}") for rank in range(2)]
        status = fork_all(2, lambda entry=entry: run_command(entry), drafts)
        said.append({"status": status, "text": [d.read_text() for d in drafts], "seconds": time.monotonic() - began})
    Path(f"{plan}.said").write_text(json.dumps(said))


def fork_all(size: int, work: Callable[[], int], drafts: list[Path]) -> list[int]:
    """Do `work` in so many new processes, which write what they print to `drafts`; the exit status of each."""
    port = find_port()
    return wait([fork(work, rank, size, port, draft) for rank, draft in enumerate(drafts)])


def fork(work: Callable[[], int], rank: int, size: int, port: int, draft: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        faulthandler.enable()  # a crash says where
        status = work()
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(children: list[int]) -> list[int]:
    """Exit statuses, once both have ended; what is left a minute after the first has ended is killed."""
    status: dict[int, int] = {}
    deadline = float("inf")
    while len(status) < len(children):
        for child in set(children) - set(status):
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status[child] = os.waitstatus_to_exitcode(code)
                deadline = min(deadline, time.monotonic() + PATIENCE)
        if time.monotonic() > deadline:
            for child in set(children) - set(status):
                os.kill(child, signal.SIGUSR1)  # a status of its own: it would have gone on for ever
        time.sleep(0.02)
    return [status[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_turn(Path(sys.argv[1]))
