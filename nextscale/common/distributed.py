"""The processes of a run: torch.distributed as torchrun or accelerate launch sets it up, or a single process.

The library Accelerate is not needed: DDP, FSDP2 and states that do not depend on the number of processes are part of
torch. Both launchers set what torch reads: RANK, WORLD_SIZE, LOCAL_RANK and the address of the first process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nextscale.common.devices import find_device


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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
        return self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device)).gt(0).tolist()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


def is_main_process() -> bool:
    """Whether this is the first process of a run, or the only one, by what the launcher has set."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def init_distributed(device: str = "auto") -> Iterator[World]:
    """Join the processes that the launcher has started. `device`: cpu, cuda, cuda:1, or auto: cuda if available."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = _choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
