"""The processes of a run: torch.distributed as torchrun or accelerate launch sets it up, or a single process.

The library Accelerate is not needed: DDP, FSDP2 and states that do not depend on the number of processes are part of
torch. Both launchers set what torch reads: RANK, WORLD_SIZE, LOCAL_RANK and the address of the first process.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.errors import UserError
from nextscale.common.peers import Peers

_PATIENCE = timedelta(days=7)
"""How long a collective operation may wait. The first process may be busy for hours, and `Peers` notices deaths."""
_sessions = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: Peers | None = None
    """The connections to the other processes, if there are any."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; each process has the same number of rows."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in at least one process."""
        if self.size == 1:
            return list(flags)
        return self.sum(torch.tensor(flags, dtype=torch.float32)).gt(0).tolist()

    def first(self, flag: bool) -> int | None:
        """The lowest rank whose flag is set, or None."""
        set_P = self.gather(torch.tensor([flag], dtype=torch.float32)).tolist()
        return set_P.index(1.0) if 1.0 in set_P else None

    def raise_first(self, error: Exception | None) -> None:
        """Raise the error of the first process that has one: there itself, in the others a ProcessFailure that names
        it. Do nothing when none has. All processes must call it.
        """
        rank = self.first(error is not None)
        if rank is None:
            return
        if rank == self.rank:
            assert error is not None, "its flag is set"
            raise error
        assert self.peers is not None, "there are other processes"
        raise self.peers.wait_for_failure()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)

    @property
    def has_failed(self) -> bool:
        """Whether a process of the run is known to have failed or died."""
        return self.peers is not None and self.peers.failure is not None


def is_main_process() -> bool:
    """Whether this is the first process of a run, or the only one, by what the launcher has set."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def init_distributed(device: str = "auto") -> Iterator[World]:
    """Join the processes that the launcher has started. `device`: as in `find_device`; cuda is this process's own.

    An error inside ends all processes: the first one that fails raises it, and the others raise a ProcessFailure that
    names the rank and the cause, also when a process dies without a word.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = _choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"several processes cannot share a device of kind {chosen.type}: give --device cpu")
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # flags do not wait for the GPU
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"nextscale-{next(_sessions)}", store)  # torchrun's keeps the addresses of an earlier one
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    dist.distributed_c10d._set_pg_timeout(_PATIENCE)
    peers = Peers.connect(rank, size, os.environ["MASTER_ADDR"], _broadcast)
    restore = _stop_at_sigterm(peers)
    try:
        yield World(rank, size, chosen, peers)
        restore()
    except BaseException as error:
        failure = peers.report(error)
        if failure is not None:
            raise failure from error
        raise
    finally:
        peers.leave()
        if peers.failure is None or chosen.type != "cuda":  # nccl would wait for the process that failed
            dist.destroy_process_group()


def _broadcast(number: int) -> int:
    """The first process's number."""
    tensor = torch.tensor(number, dtype=torch.int64)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def _stop_at_sigterm(peers: Peers) -> Callable[[], None]:
    """From now on SIGTERM interrupts like Ctrl-C, but leaves alone a process that is already about to end.

    Torchrun sends it as soon as a process has failed. Returns a function that restores the handler that was there.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not peers.is_ending():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    return restore


def _choose_device(name: str, local_rank: int) -> torch.device:
    device = find_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda" and device.index is None:
        device = find_device(f"cuda:{local_rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
