"""Expert parallelism: every process holds a part of the experts, and rows travel to those that work on them.

Rows leave sorted by expert, so what goes to one process is one piece; they come back in the same order. The exchange
waits for the host, as the pieces have different lengths. Works on any backend of torch.distributed with all-to-all.

Letters: T rows, R pairs of row and expert to send, S rows received, D width, P processes, M experts, m of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nextscale.backends.experts import find_low_precision, run_experts
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.training.engine.task import Task
from nextscale.transformer.feed_forward.experts import Dispatch, Experts, gather_rows


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
        parent, _, name = path.rpartition(".")
        setattr(task.get_submodule(parent), name, ParallelExperts.create(experts, exchange))
        for layer_name, layer in experts.named_children():
            for name, parameter in list(layer.named_parameters()):
                divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
                shared.append(f"{path}.{layer_name}.{name}")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, shared)


class Exchange:
    """Sends rows to the processes of their experts and brings the results back.

    Process p holds experts p m to (p + 1) m - 1. `group` should serve nothing else.
    """

    def __init__(self, group: Any):
        self.group, self.processes = group, dist.get_world_size(group)

    def __call__(self, rows_RD: Tensor, count_M: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`work(rows (S, D), expert (S,))` of each row on the process that has its expert, (R, D).

        `rows_RD` sorted by expert, `count_M` of them for each. All processes must call it, those without rows too.
        """
        sent_PM = count_M.view(self.processes, -1).contiguous()
        received_PM = torch.empty_like(sent_PM)
        dist.all_to_all_single(received_PM, sent_PM, group=self.group)
        send, receive = sent_PM.sum(dim=1).tolist(), received_PM.sum(dim=1).tolist()
        here_SD = _AllToAll.apply(rows_RD, send, receive, self.group)
        own_M = torch.arange(received_PM.shape[1], device=rows_RD.device).repeat(self.processes)
        done_SD = work(here_SD, own_M.repeat_interleave(received_PM.flatten()))
        return _AllToAll.apply(done_SD, receive, send, self.group)


class _AllToAll(torch.autograd.Function):
    """all_to_all_single of rows; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.way = send, receive, group
        out_SD = x_RD.new_empty(sum(receive), x_RD.shape[1])
        dist.all_to_all_single(out_SD, x_RD.contiguous(), receive, send, group=group)
        return out_SD

    @staticmethod
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group = ctx.way
        return _AllToAll.apply(dy_SD, receive, send, group), None, None, None


def get_local_part(parameter: Tensor, processes: int) -> Tensor:
    """This process's experts of a parameter that is divided among the processes.

    Its gradient is divided by their number: every process's loss is a mean over its own examples, and the gradients of
    what all processes have are averaged.
    """
    local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / processes)
    return local


class ParallelExperts(Experts):
    """The experts of a mixture, of which each process holds a part: the rows of an expert are computed by its process,
    and gates are applied where the rows come from."""

    exchange: Exchange

    @classmethod
    def create(cls, experts: Experts, exchange: Exchange) -> ParallelExperts:
        """The same parameters, already divided among the processes."""
        parallel = cls.__new__(cls)
        parallel.__dict__.update(experts.__dict__)
        parallel.exchange = exchange
        return parallel

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        parts = [get_local_part(weight, self.exchange.processes) for weight in self.weights]
        local_E = torch.arange(len(parts[0]), device=x_TD.device)

        def work(rows_SD: Tensor, expert_S: Tensor) -> Tensor:
            local = Dispatch.create(expert_S.unsqueeze(1) == local_E, len(expert_S))
            return run_experts(rows_SD, torch.ones_like(expert_S, dtype=torch.float32), local, parts)

        pairs = int(dispatch.ends_M[-1])  # without padding
        count_M = dispatch.ends_M.diff(prepend=dispatch.ends_M.new_zeros(1))
        rows_RD = gather_rows(x_TD, dispatch.row_R[:pairs])
        rows_RD = rows_RD.to(find_low_precision(x_TD) or x_TD.dtype)  # sent as they are computed
        out_RD = self.exchange(rows_RD, count_M, work)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        return y_TD.index_add(0, dispatch.row_R[:pairs], out_RD * gate_R[:pairs, None]).to(x_TD.dtype)
