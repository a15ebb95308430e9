"""Fast twins of the experts of a mixture.

Training takes the loop over experts with its backward pass written out (`nextscale.backends.experts`). Inference takes
a compiled kernel over packed weights where it computes in float32; elsewhere each expert's products are packed as a
linear layer's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.experts import add_experts_by_kernel, from_panels, to_panels
from nextscale.backends.cpu.linear import find_chain
from nextscale.backends.cpu.products import NO_GRADIENTS, NOT_TRAINABLE, PACK_ROWS, can_pack, linear, pack_weight
from nextscale.backends.experts import run_experts
from nextscale.common.errors import UserError
from nextscale.transformer.feed_forward.experts import Dispatch, Experts, StackedLinear
from nextscale.transformer.feed_forward.mixture import ZeroComputationExperts


def create_dispatch(selected_TM: Tensor, max_pairs: int) -> Dispatch:
    """`Dispatch.create` without a sort, on a CPU; no pair is padding."""
    if selected_TM.device.type != "cpu":
        return Dispatch.create(selected_TM, max_pairs)
    expert_R, row_R = selected_TM.T.nonzero().unbind(1)
    return Dispatch(row_R, expert_R, selected_TM.sum(dim=0).cumsum(0).to(torch.int32))


class CpuStackedLinear(StackedLinear):
    """StackedLinear by `products.linear`."""

    plain = StackedLinear
    converts_weight = True

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.multiply(x, expert)

    def multiply(self, x: Tensor, expert: int, gelu: bool = False) -> Tensor:
        """The layer of one expert, then tanh-GELU if `gelu`."""
        return linear(x, self.weight[expert], self.bias[expert], gelu)


class PackedStackedLinear(CpuStackedLinear):
    """For inference: the weights of each expert packed as `PackedLinear` does, or laid out for the compiled kernels.

    A weight of no size stands in for packed ones. It is saved, moved and converted as the original, bit for bit.
    """

    packed: list[Tensor] | None = None
    panels: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed, in either layout."""
        return self.packed is not None or self.panels is not None

    def multiply(self, x: Tensor, expert: int, gelu: bool = False) -> Tensor:
        if not self.is_packed and x.numel() >= PACK_ROWS * x.shape[-1]:
            self.pack()
        return linear(x, self._get_weight(expert, x), self.bias[expert], gelu)

    def _get_weight(self, expert: int, x: Tensor) -> Tensor:
        if self.panels is None:
            return self.packed[expert] if self.packed is not None else self.weight[expert]
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(NO_GRADIENTS)
        return from_panels(self.panels[expert : expert + 1], self.bias.shape[1])[0]

    def pack(self) -> None:
        """Pack the weights where that is possible."""
        if not self.is_packed and can_pack(self.weight):
            self.packed = [pack_weight(weight) for weight in self.weight.detach()]
            self._release()

    def pack_panels(self) -> None:
        """Lay the weights out for the compiled kernels."""
        if not self.is_packed:
            self.panels = to_panels(self.weight.detach())
            self._release()

    def _release(self) -> None:
        self.weight = nn.Parameter(self.weight.detach().new_empty(0), requires_grad=False)

    def _unpack(self) -> Tensor:
        if self.panels is not None:
            return from_panels(self.panels, self.bias.shape[1])
        assert self.packed is not None, "one of the two layouts"
        return torch.stack([weight.to_dense() for weight in self.packed])

    def train(self, mode: bool = True) -> PackedStackedLinear:
        if mode:
            raise UserError(NOT_TRAINABLE)
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.is_packed:
            self.weight = nn.Parameter(self._unpack(), requires_grad=False)
            self.packed = self.panels = None
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[f"{prefix}weight"] = self._unpack()


class CpuExperts(Experts):
    """Experts for training, and for inference without packing."""

    plain = Experts
    fc1: CpuStackedLinear
    fc2: CpuStackedLinear

    def forward(self, x_TD: Tensor, gates_TM: Tensor, selected_TM: Tensor, max_pairs: int) -> Tensor:
        dispatch = create_dispatch(selected_TM, max_pairs)
        return self.run(x_TD, dispatch.gather_gates(gates_TM), dispatch)

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gate_R, *self.weights))
        if gradient:
            return run_experts(x_TD, gate_R, dispatch, self.weights)
        return super().run(x_TD, gate_R, dispatch)

    def run_expert(self, expert: int, x_rD: Tensor) -> Tensor:
        if chain := find_chain(self.fc1, self.fc2):
            return chain(self.fc1, x_rD, expert)
        return self.fc2(self.fc1.multiply(x_rD, expert, gelu=True), expert)


class PackedExperts(CpuExperts):
    """Experts for inference, by the compiled kernel where there is one."""

    fc1: PackedStackedLinear
    fc2: PackedStackedLinear

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        kernels = self._load_kernels(x_TD)
        if kernels is not None:
            return self._run_kernels(kernels, x_TD, gate_R, dispatch)
        return Experts.run(self, x_TD, gate_R, dispatch)

    def _load_kernels(self, x_TD: Tensor) -> ctypes.CDLL | None:
        """The compiled kernels, where they can compute x; lays the weights out for them at the first use."""
        if self.fc1.packed is not None or not build.can_use_kernels(x_TD, self.fc1.weight, converts=True):
            return None
        kernels = build.load_kernels("experts", build.MAX_VECTORS)
        if kernels is not None:
            self.fc1.pack_panels()
            self.fc2.pack_panels()
        return kernels

    def _run_kernels(self, kernels: ctypes.CDLL, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        assert self.fc1.panels is not None, "laid out together"
        assert self.fc2.panels is not None, "laid out together"
        y_TD, pairs = torch.zeros_like(x_TD), (dispatch.row_R.contiguous(), gate_R, dispatch.ends_M)
        weights = self.fc1.panels, self.fc1.bias, self.fc2.panels, self.fc2.bias
        add_experts_by_kernel(kernels, x_TD.contiguous(), pairs, weights, into=y_TD)
        return y_TD


class CpuZeroComputationExperts(ZeroComputationExperts):
    """MoE++'s zero-computation experts with a batch-independent product."""

    plain = ZeroComputationExperts

    def sum_constants(self, weight_BNc: Tensor, constant_cD: Tensor) -> Tensor:
        return linear(weight_BNc, constant_cD.T.contiguous())
