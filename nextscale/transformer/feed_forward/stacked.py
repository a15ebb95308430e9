"""The weights of several experts as one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextscale.backends.cpu import ops
from nextscale.backends.cpu.experts import from_panels, to_panels
from nextscale.backends.cpu.ops import NO_GRADIENTS, PACK_ROWS, UNPACKED, linear
from nextscale.common.errors import UserError


class StackedLinear(nn.Module):
    """The `Linear` layers of several experts, in one weight (M, out, in) and one bias (M, out). Packed as they are."""

    may_pack = False

    def __init__(self, count: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(count, out_features))
        self._packed: list[Tensor] = []
        self.panels: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the weight is packed: then it is in `product` alone, and gives no gradients."""
        return self.panels is not None or bool(self._packed)

    def product(self, j: int, x: Tensor, gelu: bool = False) -> Tensor:
        """`linear` by the weight and bias of expert j."""
        if self.may_pack and x.numel() >= PACK_ROWS * x.shape[-1]:
            self.pack()
        return linear(x, self._of(j, x), self.bias[j], gelu)

    def _of(self, j: int, x: Tensor) -> Tensor:
        """Weight of expert j, for a product with x."""
        if self.panels is None:
            return self._packed[j] if self._packed else self.weight[j]
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(NO_GRADIENTS)
        return from_panels(self.panels[j : j + 1], self.bias.shape[1])[0]

    def pack(self, panels: bool = False) -> None:
        """As `Linear.pack`, or into the panels that the compiled kernels read (float32); a weight of no size stands in
        for the packed ones."""
        self.may_pack = False
        if self.packed or not (panels or ops.can_pack(self.weight)):
            return
        whole = self.weight.detach()
        if panels:
            self.panels = to_panels(whole)
        else:
            self._packed = [ops.packed(weight) for weight in whole]
        self.weight = nn.Parameter(whole.new_empty(0), requires_grad=False)

    def train(self, mode: bool = True) -> StackedLinear:
        if mode and (self.may_pack or self.packed):
            raise UserError(f"weights that are packed for inference cannot be trained; {UNPACKED}")
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.packed:
            self.weight = nn.Parameter(self._whole(), requires_grad=False)
            self._packed, self.panels = [], None
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[f"{prefix}weight"] = self._whole()

    def _whole(self) -> Tensor:
        if self.panels is not None:
            return from_panels(self.panels, self.bias.shape[1])
        return torch.stack([packed.to_dense() for packed in self._packed])
