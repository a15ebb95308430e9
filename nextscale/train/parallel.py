"""How a task's arithmetic is laid out: over processes, in portions, recomputed or compiled; never what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nextscale.errors import UserError
from nextscale.train.config import TrainConfig
from nextscale.train.task import Task
from nextscale.train.world import World


class Laid:
    """A task laid out over a world: call it for the loss, in a portion whose gradients are summed or kept apart."""

    def __init__(self, task: Task, config: TrainConfig, world: World):
        self.task, self.sharded = task.to(world.device), False
        self.module: nn.Module = task
        for block in task.blocks():
            if config.activation_checkpointing:
                again: Any = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                block.forward = again
            if config.compile:
                block.compile()
        if world.size == 1:
            return
        if config.sharding == "full":
            self._shard(task, config, world)
        else:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                task,
                device_ids=devices,
                broadcast_buffers=False,  # every process computes the same ones
                find_unused_parameters=task.leaves_parameters_unused,
            )

    def _shard(self, task: Task, config: TrainConfig, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not task.blocks():
            raise UserError(f"the {task.name} has no blocks to shard; train it with sharding: none")
        mesh = init_device_mesh(world.device.type, (world.size,))
        low = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.precision]
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        for block in task.blocks():
            # called by the model ahead of the block, so gathered on its own
            fully_shard(block.adaln, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task.trained, mesh=mesh, mp_policy=policy)
        self.sharded = True

    @contextmanager
    def portion(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a portion of a batch: only the last one sums gradients over the processes."""
        if self.sharded:
            self.task.trained.set_requires_gradient_sync(last)  # type: ignore[operator]
        quiet = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield

    def norm(self) -> Tensor:
        """Norm of the whole gradient."""
        return whole(nn.utils.get_total_norm([p.grad for p in self.task.trained.parameters() if p.grad is not None]))

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale the gradient, whose norm this is, to a norm of `largest` at most."""
        nn.utils.clip_grads_with_norm_(self.task.trained.parameters(), largest, norm)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from the processes that share it; itself where none do."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(like: Any, value: Tensor) -> Tensor:
    """A whole tensor divided among the processes as `like` is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the CPU, gathered from all processes. All of them must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state


class Ema:
    """A moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters as they are now."""
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the averages in here."""
        kept = {n: p.detach().clone() for n, p in self.live.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.live.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """The averages, gathered from all processes."""
        return {name: whole(tensor).cpu() for name, tensor in self.average.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take averages that `state` gave."""
        for name, tensor in self.average.items():
            tensor.copy_(shared_like(tensor, state[name].to(tensor.device)))
