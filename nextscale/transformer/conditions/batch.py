"""Batches of condition values: a tensor, or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import copy_to


class Rows:
    """Several batches of equal length by name, which are sliced together: `rows[2:4]`, `rows["text"]`."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = dict(fields)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.fields[index]
        return Rows({name: rows[index] for name, rows in self.fields.items()})


def stack_rows(name: str, values: Sequence[Tensor | None], shape: tuple[int, ...], device: torch.device) -> Rows:
    """Values of this shape, None meaning "nothing", as a batch: `name` float32 (B, ...), and `given` bool (B,)."""
    rows = [torch.zeros(shape) if value is None else value.float() for value in values]
    given = torch.tensor([value is not None for value in values], dtype=torch.bool)
    stacked = torch.stack(rows) if rows else torch.zeros(0, *shape)
    return Rows({name: copy_to(stacked, device), "given": copy_to(given, device)})


def join_rows(first: Any, second: Any) -> Any:
    """The rows of one batch and then those of another one of the same kind."""
    return _combine(lambda a, b: torch.cat([a, b]), first, second)


def choose_rows(choice_B: Tensor, first: Any, second: Any) -> Any:
    """The rows of the first batch where `choice_B` is True, and of the second one elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(choice_B.to(b.device).view(-1, *[1] * (b.ndim - 1)), a, b)

    return _combine(choose, first, second)


def _combine(combine: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return combine(first, second)
    return Rows({name: _combine(combine, first[name], second[name]) for name in first.fields})
