"""How a task's arithmetic is laid out: over processes, in portions, recomputed or compiled; never what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.training import TrainConfig
from nextscale.training.engine.task import Task
from nextscale.transformer.feed_forward.exchange import Exchange
from nextscale.transformer.feed_forward.experts import Experts
from nextscale.transformer.feed_forward.routers import Router


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
        mixtures = mixtures_of(task, task.name) if config.sharding == "experts" else {}
        if world.size == 1:
            return
        if config.sharding == "full":
            self._shard(task, config, world)
        else:
            if mixtures:
                share_experts(task, mixtures, world)
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
        # inputs stay as they are: autocast rounds what products take, and the residual stream remains in float32
        policy = MixedPrecisionPolicy(low, torch.float32 if low else None, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in task.blocks():
            for router in (m for m in block.modules() if isinstance(m, Router)):
                # rounded weights would choose other experts; few, so gathered once for forward and backward
                fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
            # called by the model ahead of the block, so gathered on its own
            fully_shard(block.adaln, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task.trained, mesh=mesh, mp_policy=exact)
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
        gradients = [p.grad for p in self.task.trained.parameters() if p.grad is not None]
        norms = [whole(nn.utils.get_total_norm(kind)) for kind in by_kind(gradients)]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale the gradient, whose norm this is, to a norm of `largest` at most."""
        for kind in by_kind(list(self.task.trained.parameters())):
            nn.utils.clip_grads_with_norm_(kind, largest, norm)


def mixtures_of(module: nn.Module, name: str) -> dict[str, Experts]:
    """The experts of every mixture in a module, by their place in it. Raises UserError when there are none to share."""
    mixtures = {place: m for place, m in module.named_modules() if isinstance(m, Experts)}
    if not mixtures:
        raise UserError(f"sharding: experts needs a mixture of experts; the {name} has none: use none or full")
    return mixtures


def share_experts(task: Task, mixtures: dict[str, Experts], world: World) -> None:
    """Leave this process its part of the experts of every mixture. UserError when they cannot be divided evenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    count = next(iter(mixtures.values())).count
    if count % world.size:
        raise UserError(f"{count} experts cannot be divided evenly among {world.size} processes")
    mesh = init_device_mesh(world.device.type, (world.size,))
    exchange, shared = Exchange(dist.new_group()), []
    for name, experts in mixtures.items():
        experts.exchange = exchange
        for layer_name, layer in experts.named_children():
            for part, parameter in list(layer.named_parameters()):
                divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, part, nn.Parameter(divided, requires_grad=parameter.requires_grad))
                shared.append(f"{name}.{layer_name}.{part}")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, shared)


T = TypeVar("T", bound=Tensor)


def by_kind(tensors: Sequence[T]) -> list[list[T]]:
    """Tensors that every process has whole and tensors that are divided, apart: no operation takes both in one list."""
    kinds: dict[bool, list[T]] = {}
    for tensor in tensors:
        kinds.setdefault(hasattr(tensor, "full_tensor"), []).append(tensor)
    return list(kinds.values())


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
        live: list[Tensor] = list(self.live.values())
        for averages, parameters in zip(by_kind(list(self.average.values())), by_kind(live), strict=True):
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)

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
