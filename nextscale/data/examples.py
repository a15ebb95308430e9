"""Training examples by index, from any storage, and the batches of a run.

A run reads an endless sequence of positions; position p is example order[p mod N] of epoch p div N. Crops and flips are
derived from the position, so they do not depend on the process, the worker or the batch that reads the example.
"""

from __future__ import annotations

import atexit
import multiprocessing
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

    skipped: Sequence[str]
    """Names of examples that are unreadable and were removed before the run."""
    inputs: dict[str, Any]
    """What the examples are made of, see `nextscale.common.inputs`; {} where they are not read from files."""

    @property
    def decodes(self) -> bool:
        """Whether fetching decodes images, which data workers can do ahead."""

    def __len__(self) -> int: ...

    def order(self, rng: torch.Generator) -> Tensor:
        """All indices, shuffled for one epoch."""

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """A batch of these examples: tensors with one row per example, and under "unreadable" the names of those that
        were replaced. Without positions nothing is random, as validation needs it."""


class MemoryExamples:
    """Examples in memory, as rows of tensors."""

    skipped: Sequence[str] = ()
    decodes = False

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors
        self.inputs: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def order(self, rng: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=rng)

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        index_B = torch.as_tensor(indices)
        return {name: tensor[index_B] for name, tensor in self.tensors.items()}


class BatchDataset(Dataset):
    """Batches of a run for a DataLoader: the item (start, stop) holds the examples of positions start to stop - 1.

    Where they cannot be read, a batch has only "fault", the text of the UserError; a DataLoader would add a traceback.
    """

    def __init__(self, examples: Examples, seed: int, purpose: str):
        self.examples, self.seed, self.purpose = examples, seed, purpose
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Tensor:
        return self.examples.order(make_generator(self.seed, self.purpose, "order", epoch))

    def select_indices(self, start: int, stop: int) -> list[int]:
        """The indices of the examples at these positions."""
        count = len(self.examples)
        return [int(self._order(position // count)[position % count]) for position in range(start, stop)]

    def __getitem__(self, span: tuple[int, int]) -> Batch:
        try:
            return self.examples.fetch(self.select_indices(*span), range(*span))
        except UserError as error:
            return {"fault": str(error)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffle)


def load_batches(dataset: BatchDataset, spans: Iterable[tuple[int, int]], workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of these spans of positions, in this order, prefetched by `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=spans,
        num_workers=workers,
        generator=torch.Generator(),  # otherwise the loader would draw from the global generator
        worker_init_fn=_ignore_signals,
        pin_memory=pin,
    )
    # torch's handler raises as soon as a worker dies, possibly in the middle of an optimizer step. Without the handler
    # the error is raised when the next batch is requested.
    handler = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    reader = iter(loader)
    for process in set(multiprocessing.active_children()) - others:
        atexit.register(process.kill)  # else Python would wait at its exit for workers that ignore its SIGTERM
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return reader


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and pre-emption signal the whole process group; only the training process reacts to them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_unreadable(names: Sequence[str], total: int, largest_share: float) -> None:
    """Raise UserError when more than this share of `total` examples (and more than one) could not be read."""
    if len(names) > max(1, largest_share * total):
        raise UserError(
            f"{len(names)} of {total} examples cannot be read: {'; '.join(names[:3])}; repair or remove them, or raise "
            "max_unreadable"
        )
