"""What can be trained: the interface between the training loop and a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.distributed import World
from nextscale.data.examples import Batch, Examples


class Task(nn.Module, ABC):
    """Examples, a loss on them, and the module that is trained.

    `forward(batch, noise, step)` returns the loss, a mean over the batch's examples, and scalars to log (vectors over
    the scales where the name ends in _per_scale). All randomness comes from `noise`. So the loss of an example does not
    depend on the process or the micro-batch that computes it. Without noise (an empty dict) the task is validated.
    """

    name: str
    """Part of the names of training states, and of the seeds of all random draws."""
    examples: Examples
    trained: nn.Module
    """Its parameters are trained; its complete state is saved."""
    saves_frozen: bool = True
    """Whether saved states have parameters that are not trained, too; otherwise a resumed task has them already."""
    tokens_per_example: int = 0
    leaves_parameters_unused: bool = False
    """Some parameters may get no gradient in a step."""
    world: World = World()
    """The processes whose forward passes are one step; set by `DistributedModel`, before that this one alone."""
    waits_in_forward: bool = False
    """Forward passes of a step wait for those of other processes."""
    micro_batch_matters: str = ""
    """Why the result depends on the micro-batch by more than rounding; empty where it does not."""

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of a complete batch, one row for each example."""
        return {}

    def check_batch(self, batch: Batch) -> None:
        """UserError for a batch that the task cannot take. It is still on the host, which need not wait for values."""

    @abstractmethod
    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch."""

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """Update what does not learn by gradients, from the batch of this step over all processes."""

    def discard_step(self) -> None:
        """Forget what forward passes have left for `after_step`."""

    def fast_modules(self) -> list[nn.Module]:
        """The models whose modules the trainer swaps for fast twins (`nextscale.backends.optimize`)."""
        return []

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the model, which are sharded, recomputed and compiled one by one."""
        return []

    def explain_missing_gradient(self, name: str) -> str | None:
        """Why a trained parameter or module may have no gradient in the first step.

        None when that is not expected; an empty text when it is normal and needs no mention.
        """
        return None

    def describe_faulty_scales(self, scalars: dict[str, Any]) -> str:
        """Which scales make the loss non-finite, as text; empty when that cannot be told."""
        return ""


@dataclass(frozen=True)
class MicroBatch:
    """The examples of one forward pass of this process."""

    batch: Batch
    noise: dict[str, Tensor]
    share: float
    """Share of this process's examples of the step, which weights the mean over the micro-batch."""
    last: bool
    """It is the last one of the step."""
