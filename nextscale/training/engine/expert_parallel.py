"""Expert parallelism: every process holds a part of the experts of every mixture."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.training.engine.task import Task
from nextscale.transformer.feed_forward.exchange import Exchange
from nextscale.transformer.feed_forward.experts import Experts


def find_mixtures(module: nn.Module, name: str) -> dict[str, Experts]:
    """The experts of every mixture in a module, by their path in it. Raises UserError when there are none."""
    mixtures = {path: m for path, m in module.named_modules() if isinstance(m, Experts)}
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
    for path, experts in mixtures.items():
        experts.exchange = exchange
        for layer_name, layer in experts.named_children():
            for name, parameter in list(layer.named_parameters()):
                divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
                shared.append(f"{path}.{layer_name}.{name}")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, shared)
