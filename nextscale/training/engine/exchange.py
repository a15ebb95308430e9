"""Expert parallelism: every process holds a part of the experts, and rows travel to those that work on them.

Rows leave sorted by expert, so what goes to one process is one piece; they come back in the same order. The exchange
waits for the host, as the pieces have different lengths. Works on any backend of torch.distributed with all-to-all.

Letters: R rows to send, S rows received, D width, P processes, M experts, m of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextscale.backends.experts import find_low_precision, run_experts
from nextscale.transformer.feed_forward.experts import Dispatch, Experts


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
        rows_RD = x_TD[dispatch.row_R[:pairs]].to(find_low_precision(x_TD) or x_TD.dtype)  # sent as they are computed
        out_RD = self.exchange(rows_RD, count_M, work)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        return y_TD.index_add(0, dispatch.row_R[:pairs], out_RD * gate_R[:pairs, None]).to(x_TD.dtype)
