"""How a task's computation is arranged: over processes, recomputed or compiled. It does not change the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nextscale.backends import optimize
from nextscale.backends.compiler import compile_block
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.notes import print_note
from nextscale.common.precision import (
    choose_training_dtype,
    describe_training_dtype,
    full_float32,
    lower_precision,
)
from nextscale.config.training import TrainConfig
from nextscale.data.examples import Batch
from nextscale.training.engine.expert_parallel import find_mixtures, share_experts
from nextscale.training.engine.task import Task
from nextscale.transformer.cross_attention import CrossAttention
from nextscale.transformer.feed_forward.routers import Router


class DistributedModel:
    """A task on the device of this process, wrapped as the config says: DDP, FSDP2, expert parallelism, or alone."""

    def __init__(self, task: Task, config: TrainConfig, world: World):
        self.task, self.world = task.to(world.device), world
        task.world = world
        for model in task.fast_modules():
            optimize(model, config.backend, training=True)
        self.dtype = choose_training_dtype(config.precision, world.device)
        self.compiled = config.compile
        if world.main and (note := describe_training_dtype(config.precision, world.device)):
            print_note("precision", note)
        self.fully_sharded = config.sharding == "full" and world.size > 1
        self.module: nn.Module = task
        for block in task.blocks():
            if config.activation_checkpointing:
                recompute_activations(block)
            if config.compile:
                compile_block(block)
        mixtures = find_mixtures(task, task.name) if config.sharding == "experts" else {}
        if self.fully_sharded:
            self._shard_fully()
        elif world.size > 1:
            if mixtures:
                share_experts(task, mixtures, world)
            self.module = DistributedDataParallel(
                task,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                broadcast_buffers=False,  # every process computes the same ones
                find_unused_parameters=task.leaves_parameters_unused,
            )

    def _shard_fully(self) -> None:
        """FSDP2: every process holds a part of each parameter."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        task = self.task
        if not task.blocks():
            raise UserError(f"the {task.name} has no blocks to shard; train it with sharding: none")
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        # inputs stay as they are: autocast rounds what products take, and the residual stream remains in float32
        low = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in task.blocks():
            for router in (m for m in block.modules() if isinstance(m, Router)):
                # rounded weights would select other experts; few, so gathered once for forward and backward
                fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
            # the model calls adaln, and reads the condition, before it calls the block: gathered by themselves
            for layer in (block.adaln, *(m.kv for m in block.modules() if isinstance(m, CrossAttention))):
                fully_shard(layer, mesh=mesh, mp_policy=low)  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(task.trained, mesh=mesh, mp_policy=exact)

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of a micro-batch, in the config's precision: the loss, and scalars to log."""
        with self.autocast(), full_float32(self.world.device) if self.compiled else nullcontext():
            return self.module(batch, noise, step)

    def autocast(self, validating: bool = False) -> torch.autocast:
        """The context of a forward pass in low precision.

        Validation computes in float32, except where FSDP2 gives the blocks rounded weights.
        """
        low = self.fully_sharded or not validating
        return lower_precision(self.world.device, self.dtype if low else torch.float32)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: only the last one sums gradients over the processes."""
        if self.fully_sharded:
            self.task.trained.set_requires_gradient_sync(last)  # type: ignore[operator]
        local = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if local else nullcontext():  # type: ignore[operator]
            yield

    def compute_gradient_norm(self) -> Tensor:
        """L2 norm of the complete gradient, over all processes."""
        gradients = [p.grad for p in self.task.trained.parameters() if p.grad is not None]
        norms = [gather_tensor(nn.utils.get_total_norm(group)) for group in separate_sharded(gradients)]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def clip_gradients(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradient, which has this norm, down to `max_norm`; 0 = leave it as it is."""
        if not max_norm:
            return
        for group in separate_sharded(list(self.task.trained.parameters())):
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)


class RecomputedBlock(nn.Module):
    """Mixin of a block whose activations are recomputed in the backward pass (activation checkpointing)."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return checkpoint(super().forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def recompute_activations(block: nn.Module) -> None:
    """Put `RecomputedBlock` before the block's class, as `fully_shard` does with its own. Parameters keep their names.

    A wrapper module around the block would rename them in training states.
    """
    if not isinstance(block, RecomputedBlock):
        kind = type(block)
        block.__class__ = type(f"Recomputed{kind.__name__}", (RecomputedBlock, kind), {})


T = TypeVar("T", bound=Tensor)


def separate_sharded(tensors: Sequence[T]) -> list[list[T]]:
    """Group tensors by whether they are divided among processes: operations on lists do not take both together."""
    groups: dict[bool, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(hasattr(tensor, "full_tensor"), []).append(tensor)
    return list(groups.values())


def get_own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided among processes; all of one that is not. Nothing is sent."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from the processes among which it is divided; itself where it is not divided."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(reference: Any, value: Tensor) -> Tensor:
    """Divide a complete tensor among the processes as `reference` is divided."""
    if not hasattr(reference, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, reference.device_mesh, reference.placements)


def gather_weights(module: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """The module's state dict on the CPU, gathered from all processes. All of them must call it.

    `frozen`: with parameters that are not trained.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)
    state: Any = get_model_state_dict(module, options=options)
    return state
