"""The experts of a mixture, and the one executor: whichever router selects, each expert computes the rows that selected
it, and no others.

No row is dropped and none is computed for nothing; memory grows with the pairs of row and expert, not with rows times
experts. The fast twins in `nextscale.backends` compute the same function.

Letters: T rows, D width, F hidden width, M experts, R pairs of row and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gather_rows(source_TD: Tensor, row_R: Tensor) -> Tensor:
    """`source_TD[row_R]`, (R, D), with a backward pass that is fast on a GPU.

    That of an index by tensors adds up the rows of a gradient that have the same index one after the other; thousands
    of rows have the bias of one expert.
    """
    return F.embedding(row_R, source_TD)


@dataclass(frozen=True)
class Dispatch:
    """Which rows go to which expert: R pairs, sorted by expert and then by row."""

    row_R: Tensor
    expert_R: Tensor
    ends_M: Tensor
    """int32: where the pairs of each expert end. Pairs after the last end are padding."""

    @staticmethod
    def create(selected_TM: Tensor, max_pairs: int) -> Dispatch:
        """From a mask with at most `max_pairs` pairs; fewer ones are padded, so that no size depends on the mask."""
        T, M = selected_TM.shape
        pair_R = selected_TM.T.flatten().logical_not().argsort(stable=True)[: min(max_pairs, M * T)]
        return Dispatch(pair_R % T, pair_R // T, selected_TM.sum(dim=0).cumsum(0).to(torch.int32))

    def gather_gates(self, gates_TM: Tensor) -> Tensor:
        """The gate of each pair, (R,)."""
        return gates_TM.flatten().gather(0, self.row_R * gates_TM.shape[1] + self.expert_R)

    def list_slices(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of each expert that has rows; waits for the device. On meta the load is even."""
        M, R = len(self.ends_M), len(self.row_R)
        ends = [R * (j + 1) // M for j in range(M)] if self.ends_M.is_meta else self.ends_M.tolist()
        return [(j, i, e) for j, (i, e) in enumerate(zip([0, *ends], ends, strict=False)) if e > i]


class StackedLinear(nn.Module):
    """The linear layers of several experts, in one weight (M, out, in) and one bias (M, out)."""

    def __init__(self, count: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(count, out_features))

    @torch.no_grad()
    def initialize_weights(self, spread: float, generator: torch.Generator) -> None:
        """As VAR's dense layers."""
        nn.init.trunc_normal_(self.weight, std=spread, generator=generator)
        self.bias.zero_()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """The layer of one expert."""
        return F.linear(x, self.weight[expert], self.bias[expert])


class Experts(nn.Module):
    """M feed-forward networks, D to F to D with tanh-GELU, as the dense block's."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.count = count
        self.fc1 = StackedLinear(count, width, hidden)
        self.fc2 = StackedLinear(count, hidden, width)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fc1's weight (M, F, D) and bias (M, F), fc2's weight (M, D, F) and bias (M, D)."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def forward(self, x_TD: Tensor, gates_TM: Tensor, selected_TM: Tensor, max_pairs: int) -> Tensor:
        """sum_j gates[i, j] E_j(x_i) over the experts j that row i has selected (Eq. 6), (T, D).

        `selected_TM` is a mask with at most `max_pairs` pairs.
        """
        dispatch = Dispatch.create(selected_TM, max_pairs)
        return self.run(x_TD, dispatch.gather_gates(gates_TM), dispatch)

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        """One expert after the other."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        add_experts(x_TD, dispatch, self.run_expert, gate_R, into=y_TD)
        return y_TD.to(x_TD.dtype)

    def run_expert(self, expert: int, x_rD: Tensor) -> Tensor:
        """E_j of rows (r, D)."""
        return self.fc2(F.gelu(self.fc1(x_rD, expert), approximate="tanh"), expert)


def add_experts(
    x_TD: Tensor, dispatch: Dispatch, run_expert: Callable[[int, Tensor], Tensor], gate_R: Tensor | None = None,
    *, into: Tensor,
) -> None:  # fmt: skip
    """Add to `into` (T, D) the output of `run_expert(expert, rows)` for each expert, times the gates if there are any.

    One expert after the other: the order of a row's sum is the same, whatever rows share the batch.
    """
    for expert, start, end in dispatch.list_slices():
        row_r = dispatch.row_R[start:end]
        out_rD = run_expert(expert, x_TD[row_r])
        into.index_add_(0, row_r, (out_rD if gate_R is None else out_rD * gate_R[start:end, None]).to(into.dtype))
