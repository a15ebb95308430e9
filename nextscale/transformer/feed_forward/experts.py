"""The one executor of experts: whoever routes, each expert computes the rows that were given to it, and no others.

No row is dropped and none is computed for nothing; memory grows with the pairs of row and expert, not with rows times
experts. Four ways to the same function:

- `Experts.in_turn`, one expert after the other: what the others are tested against;
- `add_experts`, a compiled kernel: packed weights on a CPU in float32 (`nextscale.backends.cpu`);
- `_Differentiated`, the same with gradients, written out;
- `grouped`: on a GPU in 16 bits, all experts in one product, without waiting for the host.

With expert parallelism each process computes the rows of its own experts in these ways (`Exchange`).

Letters: T rows, D width, F hidden width, M experts, R pairs of row and expert, sorted by expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nextscale.backends.cpu import build, ops
from nextscale.backends.cpu.experts import add_experts
from nextscale.backends.cpu.ops import full_precision, input_gradient, low_precision, product, weight_gradient
from nextscale.transformer.feed_forward.exchange import Exchange, local_part
from nextscale.transformer.feed_forward.stacked import StackedLinear


@dataclass(frozen=True)
class Dispatch:
    """Which rows go to which expert: R pairs, sorted by expert and then by row."""

    row_R: Tensor
    expert_R: Tensor
    ends_M: Tensor
    """int32: where the pairs of each expert end. Pairs after the last end are padding."""

    @staticmethod
    def of(chosen_TM: Tensor, at_most: int) -> Dispatch:
        """From a mask with `at_most` pairs. On a GPU there are always so many, some of them padding: then nothing has
        to wait until the mask is known."""
        T, M = chosen_TM.shape
        ends_M = chosen_TM.sum(dim=0).cumsum(0).to(torch.int32)
        if chosen_TM.device.type == "cpu":
            expert_R, row_R = chosen_TM.T.nonzero().unbind(1)
        else:
            pair_R = chosen_TM.T.flatten().logical_not().argsort(stable=True)[: min(at_most, M * T)]
            expert_R, row_R = pair_R // T, pair_R % T
        return Dispatch(row_R, expert_R, ends_M)

    def pieces(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of each expert that has rows; waits for the device. On meta the load is even."""
        M, R = len(self.ends_M), len(self.row_R)
        ends = [R * (j + 1) // M for j in range(M)] if self.ends_M.is_meta else self.ends_M.tolist()
        return [(j, i, e) for j, (i, e) in enumerate(zip([0, *ends], ends, strict=False)) if e > i]


class Experts(nn.Module):
    """M feed-forward networks, D to F to D with tanh-GELU, as the dense block's."""

    may_pack = False

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.count = count
        self.fc1 = StackedLinear(count, width, hidden)
        self.fc2 = StackedLinear(count, hidden, width)
        self.exchange: Exchange | None = None

    def forward(self, x_TD: Tensor, gates_TM: Tensor, chosen_TM: Tensor, at_most: int) -> Tensor:
        """sum_j gates[i, j] E_j(x_i) over the experts j that row i has chosen (Eq. 6), (T, D).

        `chosen_TM` is a mask with `at_most` pairs.
        """
        dispatch = Dispatch.of(chosen_TM, at_most)
        gate_R = gates_TM[dispatch.row_R, dispatch.expert_R]
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        if self.exchange is not None:
            return _exchanged(x_TD, gate_R, dispatch, weights, self.exchange)
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gate_R, *weights))
        if ops.fast and not self.fc1.packed and (differentiated or _in_one(x_TD, self.fc1.weight)):
            return _computed(x_TD, gate_R, dispatch, weights)
        kernels = self.kernels(x_TD)
        if kernels is not None:
            return self.compiled(kernels, x_TD, gate_R, dispatch)
        return self.in_turn(x_TD, gate_R, dispatch)

    def kernels(self, x_TD: Tensor) -> ctypes.CDLL | None:
        """The compiled kernels, where they can compute x; packs the weights for them at the first use, if it may."""
        mine = self.may_pack or self.fc1.panels is not None
        kernels = build.load("experts") if mine and build.usable(x_TD, self.fc1.bias) else None
        if kernels is not None and self.may_pack:
            self.may_pack = False
            self.fc1.pack(panels=True)
            self.fc2.pack(panels=True)
        return kernels

    def compiled(self, kernels: ctypes.CDLL, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        """By the compiled kernels, for which the weights were packed."""
        assert self.fc1.panels is not None, "packed together"
        assert self.fc2.panels is not None, "packed together"
        y_TD, pairs = torch.zeros_like(x_TD), (dispatch.row_R.contiguous(), gate_R, dispatch.ends_M)
        weights = self.fc1.panels, self.fc1.bias, self.fc2.panels, self.fc2.bias
        add_experts(kernels, x_TD.contiguous(), pairs, weights, into=y_TD)
        return y_TD

    def in_turn(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        """One expert after the other."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        looped(x_TD, dispatch, lambda j, x: self.fc2.product(j, self.fc1.product(j, x, gelu=True)), gate_R, into=y_TD)
        return y_TD.to(x_TD.dtype)


def looped(
    x_TD: Tensor, dispatch: Dispatch, work: Callable[[int, Tensor], Tensor], gate_R: Tensor | None = None,
    *, into: Tensor,
) -> None:  # fmt: skip
    """Add to `into` (T, D) what `work(expert, rows)` gives, times the gates where there are any.

    One expert after the other; so the order of the sum is the same, whatever rows share the batch.
    """
    for j, start, end in dispatch.pieces():
        row_r = dispatch.row_R[start:end]
        out_rD = work(j, x_TD[row_r])
        into.index_add_(0, row_r, (out_rD if gate_R is None else out_rD * gate_R[start:end, None]).to(into.dtype))


def groups(x_TD: Tensor, widths: tuple[int, int]) -> bool:
    """Whether one grouped product can do it: on a GPU in 16 bits, for experts' widths that are multiples of 8."""
    return x_TD.device.type == "cuda" and low_precision(x_TD) is not None and not any(width % 8 for width in widths)


def _in_one(x_TD: Tensor, w1_MFD: Tensor) -> bool:
    return groups(x_TD, (w1_MFD.shape[1], w1_MFD.shape[2]))


def _computed(x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch, weights: Sequence[Tensor]) -> Tensor:
    """The fast ways, in the precision at hand."""
    low = low_precision(x_TD)
    rows, *cast = (t.to(low or t.dtype) for t in (x_TD, *weights))
    if _in_one(x_TD, weights[0]):
        w1_MFD, b1_MF, w2_MDF, b2_MD = cast
        return grouped(rows, gate_R, dispatch, w1_MFD, b1_MF, w2_MDF, b2_MD)
    with full_precision(rows):
        return _Differentiated.apply(rows, gate_R.to(rows.dtype), dispatch.row_R, dispatch.pieces(), *cast)


def _exchanged(
    x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch, weights: Sequence[Tensor], exchange: Exchange
) -> Tensor:
    """As `_computed`, each expert's rows computed by the process that holds it; the gates are applied at home."""
    parts = [local_part(weight, exchange.processes) for weight in weights]
    own = torch.arange(len(parts[0]), device=x_TD.device)

    def work(rows_SD: Tensor, expert_S: Tensor) -> Tensor:
        here = Dispatch.of(expert_S.unsqueeze(1) == own, len(expert_S))
        return _computed(rows_SD, torch.ones_like(expert_S, dtype=torch.float32), here, parts)

    real = int(dispatch.ends_M[-1])  # without padding
    count_M = dispatch.ends_M.diff(prepend=dispatch.ends_M.new_zeros(1))
    rows_RD = x_TD[dispatch.row_R[:real]]
    out_RD = exchange(rows_RD.to(low_precision(x_TD) or x_TD.dtype), count_M, work)  # travels as it is computed
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    return y_TD.index_add(0, dispatch.row_R[:real], out_RD * gate_R[:real, None]).to(x_TD.dtype)


class _Differentiated(torch.autograd.Function):
    """The loop with its backward pass written out: a weight's gradient goes straight to its place in the stack, where
    autograd would add up one array of all experts for each of them; and gates need no output to be kept."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_R: Tensor, row_R: Tensor, pieces: list[tuple[int, int, int]],
        w1_MFD: Tensor, b1_MF: Tensor, w2_MDF: Tensor, b2_MD: Tensor,
    ) -> Tensor:  # fmt: skip
        y_TD, kept = torch.zeros_like(x_TD), []
        for j, start, end in pieces:
            row_r = row_R[start:end]
            h_rF = product(x_TD[row_r], w1_MFD[j], b1_MF[j])
            a_rF = F.gelu(h_rF, approximate="tanh")
            out_rD = product(a_rF, w2_MDF[j], b2_MD[j])
            y_TD.index_add_(0, row_r, out_rD.mul_(gate_R[start:end, None]))
            kept += [h_rF, a_rF]
        ctx.save_for_backward(x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, *kept)
        ctx.pieces = pieces
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, *kept = ctx.saved_tensors
        dx_TD, dgate_R = torch.zeros_like(x_TD), torch.zeros_like(gate_R)  # of padding it stays 0
        dw1_MFD, dw2_MDF, db2_MD = torch.empty_like(w1_MFD), torch.empty_like(w2_MDF), torch.zeros_like(b2_MD)
        db1_MF = w1_MFD.new_zeros(w1_MFD.shape[:2])
        for j in set(range(len(w1_MFD))) - {piece[0] for piece in ctx.pieces}:
            dw1_MFD[j] = dw2_MDF[j] = 0
        for n, (j, start, end) in enumerate(ctx.pieces):
            h_rF, a_rF = kept[2 * n : 2 * n + 2]
            row_r, gate_r1 = row_R[start:end], gate_R[start:end, None]
            x_rD, dy_rD = x_TD[row_r], dy_TD[row_r]
            da_rF = input_gradient(dy_rD, w2_MDF[j], a_rF)  # as if the gate were 1
            dgate_R[start:end] = torch.linalg.vecdot(da_rF, a_rF) + dy_rD @ b2_MD[j]
            dout_rD = dy_rD.mul_(gate_r1)
            weight_gradient(dout_rD, a_rF, w2_MDF[j], out=dw2_MDF[j])
            db2_MD[j] = dout_rD.sum(dim=0)
            dh_rF = torch.ops.aten.gelu_backward(da_rF.mul_(gate_r1), h_rF, approximate="tanh")
            weight_gradient(dh_rF, x_rD, w1_MFD[j], out=dw1_MFD[j])
            db1_MF[j] = dh_rF.sum(dim=0)
            dx_TD.index_add_(0, row_r, input_gradient(dh_rF, w1_MFD[j], x_rD))
        return dx_TD, dgate_R, None, None, dw1_MFD, db1_MF, dw2_MDF, db2_MD


def grouped(
    x_TD: Tensor, gate_R: Tensor | None, dispatch: Dispatch,
    w1_MFD: Tensor, b1_MF: Tensor, w2_MDF: Tensor, b2_MD: Tensor | None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """All experts in one grouped product each way (torch's `grouped_mm`), T x D. Without gates they are 1.

    It leaves padding rows uninitialised, in its output and in its input's gradient; a product with 0 would not clear
    them, so they are masked on both sides. D and F must be multiples of 8 in 16 bits, 4 in float32.
    """
    pair_R = torch.arange(len(dispatch.row_R), device=x_TD.device)
    real_R1 = (pair_R < dispatch.ends_M[-1]).unsqueeze(1)

    def products(x: Tensor, weight_M: Tensor, bias_M: Tensor | None) -> Tensor:
        out = F.grouped_mm(torch.where(real_R1, x, 0), weight_M.transpose(1, 2), offs=dispatch.ends_M)
        out = torch.where(real_R1, out, 0)
        return out if bias_M is None else out + bias_M[dispatch.expert_R]

    h_RF = products(x_TD[dispatch.row_R], w1_MFD, b1_MF)
    a_RF = h_RF.relu() if relu else F.gelu(h_RF, approximate="tanh")
    out_RD = torch.where(real_R1, products(a_RF, w2_MDF, b2_MD), 0)
    out_RD = out_RD if gate_R is None else out_RD * gate_R.unsqueeze(1)
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, dispatch.row_R, out_RD.float())
    return y_TD.to(x_TD.dtype)
