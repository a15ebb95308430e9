"""What a training step is fed with: examples by number, wherever they come from.

A run goes through an endless row of places; place p is example order[p mod N] of epoch p div N. All that is random
about an example is derived from its place, so it does not depend on the process, the worker or the batch that reads it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator

Batch = dict[str, Any]


class Examples(Protocol):
    """A set of examples that can be fetched in any order."""

    left_out: Sequence[str]
    """Names of examples that were found unreadable and left out from the start."""

    def __len__(self) -> int: ...

    def order(self, rng: torch.Generator) -> Tensor:
        """All indices, shuffled for one epoch."""

    def fetch(self, index: Sequence[int], place: Sequence[int] | None) -> Batch:
        """A batch of these examples: tensors with one row for each, and under "unreadable" the names of those that
        were replaced. Without places nothing is random: what held-out examples are measured with."""


class MemoryExamples:
    """Examples that are rows of tensors."""

    left_out: Sequence[str] = ()

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def order(self, rng: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=rng)

    def fetch(self, index: Sequence[int], place: Sequence[int] | None) -> Batch:
        rows = torch.as_tensor(index)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


class Places(Dataset):
    """Examples by place; an item is a whole batch, asked for as (first place, last place + 1)."""

    def __init__(self, examples: Examples, seed: int, purpose: str):
        self.examples, self.seed, self.purpose = examples, seed, purpose
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Tensor:
        return self.examples.order(make_generator(self.seed, self.purpose, "order", epoch))

    def indices(self, start: int, stop: int) -> list[int]:
        """Which examples stand at these places."""
        count = len(self.examples)
        return [int(self._order(place // count)[place % count]) for place in range(start, stop)]

    def __getitem__(self, span: tuple[int, int]) -> Batch:
        return self.examples.fetch(self.indices(*span), range(*span))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffle)


def batches(places: Places, spans: Iterable[tuple[int, int]], workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of these spans of places, in this order, read ahead by `workers` processes."""
    loader = DataLoader(
        places,
        batch_size=None,
        sampler=spans,
        num_workers=workers,
        generator=torch.Generator(),  # its own, so that reading draws nothing from the global one
        worker_init_fn=_quiet,
        pin_memory=pin,
    )
    # torch would raise at a worker's death wherever the program is, also amid an update; without its handler the death
    # comes to light when the next batch is asked for
    handler = signal.getsignal(signal.SIGCHLD)
    reader = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return reader


def _quiet(worker: int) -> None:
    """Ctrl-C and pre-emption reach the whole process group; the training process decides what to do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_unreadable(names: Sequence[str], total: int, largest_share: float) -> None:
    """Raise UserError when more than this share of `total` examples (and more than one) could not be read."""
    if len(names) > max(1, largest_share * total):
        raise UserError(
            f"{len(names)} of {total} examples cannot be read: {'; '.join(names[:3])}; mend or remove them, or raise "
            "max_unreadable"
        )
