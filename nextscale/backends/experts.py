"""Ways to run the experts of a mixture, on any device.

- `DifferentiableExperts`: one expert after the other with the backward pass written out;
- `run_grouped`: all experts in one grouped product, on a GPU in bfloat16.

Letters: T rows, D width, F hidden width, M experts, R pairs of row and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nextscale.backends.cpu.products import compute_input_gradient, compute_weight_gradient, multiply_rows
from nextscale.common.precision import disable_autocast
from nextscale.transformer.feed_forward.experts import Dispatch, gather_rows


def find_low_precision(x: Tensor) -> torch.dtype | None:
    """The 16-bit dtype that a layer computes in on x, or None for float32."""
    kind = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def can_group(x_TD: Tensor, widths: tuple[int, int]) -> bool:
    """Whether one grouped product can run the experts: on a GPU in bfloat16, for widths that are multiples of 8.

    In other dtypes torch multiplies one expert after the other, and waits for the device.
    """
    low = find_low_precision(x_TD) is torch.bfloat16
    return x_TD.device.type == "cuda" and low and not any(width % 8 for width in widths)


def run_experts(x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch, weights: Sequence[Tensor]) -> Tensor:
    """`Experts.run`, (T, D), in the precision at hand and with gradients. `weights` as `Experts.weights`."""
    low = find_low_precision(x_TD)
    rows, *cast = (t.to(low or t.dtype) for t in (x_TD, *weights))
    if can_group(x_TD, (weights[0].shape[1], weights[0].shape[2])):
        w1_MFD, b1_MF, w2_MDF, b2_MD = cast
        return run_grouped(rows, gate_R, dispatch, w1_MFD, b1_MF, w2_MDF, b2_MD)
    with disable_autocast(rows):
        slices = dispatch.list_slices()
        return DifferentiableExperts.apply(rows, gate_R.to(rows.dtype), dispatch.row_R, slices, *cast)


class DifferentiableExperts(torch.autograd.Function):
    """The loop over experts with its backward pass written out.

    A weight's gradient goes straight to its place in the stack, where autograd would add up one array of all experts
    for each of them; and the gates' gradients need no stored outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_R: Tensor, row_R: Tensor, slices: list[tuple[int, int, int]],
        w1_MFD: Tensor, b1_MF: Tensor, w2_MDF: Tensor, b2_MD: Tensor,
    ) -> Tensor:  # fmt: skip
        y_TD, hidden = torch.zeros_like(x_TD), []
        for j, start, end in slices:
            row_r = row_R[start:end]
            h_rF = multiply_rows(x_TD[row_r], w1_MFD[j], b1_MF[j])
            a_rF = F.gelu(h_rF, approximate="tanh")
            out_rD = multiply_rows(a_rF, w2_MDF[j], b2_MD[j])
            y_TD.index_add_(0, row_r, out_rD.mul_(gate_R[start:end, None]))
            hidden += [h_rF, a_rF]
        ctx.save_for_backward(x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, *hidden)
        ctx.slices = slices
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, *hidden = ctx.saved_tensors
        dx_TD, dgate_R = torch.zeros_like(x_TD), torch.zeros_like(gate_R)  # padding has no gradient
        dw1_MFD, dw2_MDF, db2_MD = torch.empty_like(w1_MFD), torch.empty_like(w2_MDF), torch.zeros_like(b2_MD)
        db1_MF = w1_MFD.new_zeros(w1_MFD.shape[:2])
        for j in set(range(len(w1_MFD))) - {piece[0] for piece in ctx.slices}:
            dw1_MFD[j] = dw2_MDF[j] = 0
        for n, (j, start, end) in enumerate(ctx.slices):
            h_rF, a_rF = hidden[2 * n : 2 * n + 2]
            row_r, gate_r1 = row_R[start:end], gate_R[start:end, None]
            x_rD, dy_rD = x_TD[row_r], dy_TD[row_r]
            da_rF = compute_input_gradient(dy_rD, w2_MDF[j], a_rF)  # as if the gate were 1
            dgate_R[start:end] = torch.linalg.vecdot(da_rF, a_rF) + dy_rD @ b2_MD[j]
            dout_rD = dy_rD.mul_(gate_r1)
            compute_weight_gradient(dout_rD, a_rF, w2_MDF[j], out=dw2_MDF[j])
            db2_MD[j] = dout_rD.sum(dim=0)
            dh_rF = torch.ops.aten.gelu_backward(da_rF.mul_(gate_r1), h_rF, approximate="tanh")
            compute_weight_gradient(dh_rF, x_rD, w1_MFD[j], out=dw1_MFD[j])
            db1_MF[j] = dh_rF.sum(dim=0)
            dx_TD.index_add_(0, row_r, compute_input_gradient(dh_rF, w1_MFD[j], x_rD))
        return dx_TD, dgate_R, None, None, dw1_MFD, db1_MF, dw2_MDF, db2_MD


def run_grouped(
    x_TD: Tensor, gate_R: Tensor | None, dispatch: Dispatch,
    w1_MFD: Tensor, b1_MF: Tensor, w2_MDF: Tensor, b2_MD: Tensor | None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """All experts in one grouped product each way (torch's `grouped_mm`), T x D. Without gates they are 1.

    It leaves padding rows uninitialised, in its output and in its input's gradient; a product with 0 would not clear
    them, so they are masked on both sides. D and F must be multiples of 8 in 16 bits, 4 in float32.
    """
    pair_R = torch.arange(len(dispatch.row_R), device=x_TD.device)
    valid_R1 = (pair_R < dispatch.ends_M[-1]).unsqueeze(1)

    def multiply(x: Tensor, weight_M: Tensor, bias_M: Tensor | None) -> Tensor:
        out = F.grouped_mm(torch.where(valid_R1, x, 0), weight_M.transpose(1, 2), offs=dispatch.ends_M)
        out = torch.where(valid_R1, out, 0)
        return out if bias_M is None else out + gather_rows(bias_M, dispatch.expert_R)

    h_RF = multiply(gather_rows(x_TD, dispatch.row_R), w1_MFD, b1_MF)
    a_RF = h_RF.relu() if relu else F.gelu(h_RF, approximate="tanh")
    out_RD = torch.where(valid_R1, multiply(a_RF, w2_MDF, b2_MD), 0)
    out_RD = out_RD if gate_R is None else out_RD * gate_R.unsqueeze(1)
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, dispatch.row_R, out_RD.float())
    return y_TD.to(x_TD.dtype)
