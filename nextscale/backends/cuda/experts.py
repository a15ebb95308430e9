"""Fast twin of the experts of a mixture on a GPU. Nothing waits for the device.

Letters: T rows, D width, F hidden width, M experts, R pairs of row and expert, sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nextscale.backends.cuda.tiles import Tiles, load_products, plan_tiles
from nextscale.backends.experts import can_group, find_low_precision, run_experts
from nextscale.common.precision import disable_autocast
from nextscale.transformer.feed_forward.experts import Dispatch, Experts


class CudaExperts(Experts):
    """In bfloat16 all experts in torch's grouped product; in other dtypes, for which torch's waits, in tiles."""

    plain = Experts

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        if x_TD.is_meta:
            return super().run(x_TD, gate_R, dispatch)
        if can_group(x_TD, (self.fc1.weight.shape[1], self.fc1.weight.shape[2])):
            return run_experts(x_TD, gate_R, dispatch, self.weights)
        low = find_low_precision(x_TD) or x_TD.dtype
        rows, *weights = (t.to(low) for t in (x_TD, *self.weights))
        with disable_autocast(rows):
            return TiledExperts.apply(rows, gate_R, dispatch.row_R, dispatch.ends_M, *weights)


class TiledExperts(torch.autograd.Function):
    """`Experts.run` in tiles, with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_R: Tensor, row_R: Tensor, ends_M: Tensor,
        w1_MFD: Tensor, b1_MF: Tensor, w2_MDF: Tensor, b2_MD: Tensor,
    ) -> Tensor:  # fmt: skip
        products, tiles = load_products(x_TD.device), plan_tiles(ends_M, len(row_R))
        h_RF = products.multiply(x_TD, w1_MFD, tiles, row_R, b1_MF)
        a_RF = F.gelu(h_RF, approximate="tanh")
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        products.multiply(a_RF, w2_MDF, tiles, row_R, b2_MD, gate_R=gate_R, into=y_TD)
        ctx.save_for_backward(x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, h_RF, a_RF)
        ctx.tiles = tiles
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_R, row_R, w1_MFD, w2_MDF, b2_MD, h_RF, a_RF = ctx.saved_tensors
        products, tiles = load_products(x_TD.device), ctx.tiles
        da_RF = products.multiply(dy_TD, w2_MDF.mT, tiles, row_R)  # as if the gates were 1
        expert_R, valid_R = find_groups(tiles, len(row_R))
        dy_RD = dy_TD[row_R]
        dgate_R = torch.linalg.vecdot(da_RF, a_RF) + torch.linalg.vecdot(dy_RD, b2_MD[expert_R])
        gate_R1 = gate_R.unsqueeze(1).to(dy_RD.dtype)
        dout_RD = dy_RD * gate_R1
        dh_RF = torch.ops.aten.gelu_backward(da_RF * gate_R1, h_RF, approximate="tanh")
        one_R1 = torch.ones_like(dout_RD[:, :1])
        dx_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        products.multiply(dh_RF, w1_MFD.mT, tiles, row_R, into=dx_TD)
        return (
            dx_TD.to(x_TD.dtype), torch.where(valid_R, dgate_R, 0).to(gate_R.dtype), None, None,
            products.add_outer_products(dh_RF, x_TD[row_R], tiles),
            products.add_outer_products(dh_RF, one_R1, tiles).squeeze(-1),
            products.add_outer_products(dout_RD, a_RF, tiles),
            products.add_outer_products(dout_RD, one_R1, tiles).squeeze(-1),
        )  # fmt: skip


def find_groups(tiles: Tiles, rows: int) -> tuple[Tensor, Tensor]:
    """The group of each row, that of the last for rows of none; and which rows have one."""
    row_R = torch.arange(rows, device=tiles.ends_M.device)
    group_R = torch.searchsorted(tiles.ends_M, row_R.int(), right=True)
    return group_R.clamp_max(len(tiles.ends_M) - 1), row_R < tiles.ends_M[-1]
