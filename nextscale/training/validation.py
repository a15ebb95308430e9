"""Validation of a task on held-out examples, of one size or of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.common.devices import copy_to
from nextscale.common.distributed import World
from nextscale.common.precision import widen
from nextscale.data.examples import Examples
from nextscale.data.sizes import OneSize, SizedExamples
from nextscale.training.engine.log import Values
from nextscale.training.engine.task import Task

_BATCH = 64


@torch.no_grad()
def validate(task: Task, held_out: Examples, limit: int, world: World) -> Values:
    """Averages of a task's loss and scalars over at most `limit` held-out examples; of several sizes, over as many of
    each, and `average_sizes` says what of them.

    The processes share the work; all must call it.
    """
    if isinstance(held_out, SizedExamples):
        parts = [OneSize(held_out, number) for number in range(len(held_out.parts))]
        return average_sizes([validate(task, part, limit, world) for part in parts], held_out)
    count = min(len(held_out), limit)
    starts = list(range(0, count, _BATCH))
    sums: dict[str, Tensor] = {}
    unreadable: list[str] = []
    for turn in range(0, len(starts), world.size):
        index = turn + world.rank
        start = starts[min(index, len(starts) - 1)]  # all processes compute in every turn: sharded models need it
        rows = range(start, min(start + _BATCH, count))
        weight = len(rows) / count if index < len(starts) else 0.0
        batch = held_out.fetch(rows, None)
        unreadable += batch.pop("unreadable", [])
        task.check_batch(batch)
        loss, scalars = task({name: copy_to(tensor, world.device) for name, tensor in batch.items()}, {}, 0)
        for name, value in {"loss": loss, **scalars}.items():
            sums[name] = sums.get(name, 0) + widen(value) * weight
    values: Values = {f"validation_{name}": world.sum(value).tolist() for name, value in sums.items()}
    return values | {"unreadable": unreadable} if unreadable else values


def average_sizes(measured: Sequence[Values], held_out: SizedExamples) -> Values:
    """The values of each size under its name, such as validation_loss_at_8x8 and validation_loss_at_8x8_per_scale; and
    without a name the mean of all sizes, of lists those of the model's own size."""
    unreadable = [name for part in measured for name in part.pop("unreadable", ())]
    values: Values = {}
    for name, own in measured[held_out.own].items():
        if all(name in part for part in measured):
            values[name] = own if isinstance(own, list) else sum(part[name] for part in measured) / len(measured)
    for size, part in zip(held_out.names, measured, strict=True):
        for name, value in part.items():
            stem, found, _ = name.partition("_per_scale")
            values[f"{stem}_at_{size}{found}"] = value
    return values | ({"unreadable": unreadable} if unreadable else {})
