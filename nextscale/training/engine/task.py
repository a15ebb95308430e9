"""What can be trained: the seam between the one trainer and its tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.distributed import World
from nextscale.data.examples import Batch, Examples


class Task(nn.Module):
    """Examples, a loss on them, and the module that learns.

    `forward(batch, noise, step)` gives the loss, a mean over the batch's examples, and scalars worth logging (vectors
    over the scales where the name ends in _per_scale). All randomness comes from `noise`, so that an example's loss
    does not depend on the process or the portion of the batch that computes it.
    """

    name: str
    examples: Examples
    trained: nn.Module
    """Its parameters are trained; its whole state is saved."""
    tokens_per_example: int = 0
    leaves_parameters_unused: bool = False
    """Some parameters may get no gradient in a step."""

    def noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of a whole batch, one row for each example."""
        return {}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """What learns by other means than the gradient, from the batch of this step over all processes."""

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the module, which are sharded and compiled one by one."""
        return []

    def scales_at_fault(self, scalars: dict[str, Any]) -> str:
        """Which scales a loss that is not finite comes from; empty when it cannot be told."""
        return ""
