"""Fast twin of linear layers in 8 bits: oneDNN's products of integers, compiled kernels around them.

Letters: R rows, O outputs, I inputs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.kernels.int8 import finish, finish_and_quantise, quantise
from nextscale.common.precision import is_fast
from nextscale.transformer.int8 import LEVELS, Int8Linear, QuantisedRows

_AT_ONCE = 2**21
"""Sums that are computed together, 8 MiB: what follows finds them in the third cache."""


@lru_cache(maxsize=1)
def find_levels() -> int:
    """The largest integer of an input here: 255, or 127 where oneDNN would add up two products in 16 bits.

    Without the instructions for it (VNNI) two products of 255 and 127 overflow, and the sum is wrong without a message.
    """
    width, u = 256, torch.full((64, 256), LEVELS, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((width, width), 127, dtype=torch.int8), None)
    scale, zeros = torch.ones(width), torch.zeros(width, dtype=torch.int32)
    sums = torch.cat([_multiply(rows, packed, scale, zeros) for rows in (u[:1], u)])
    return LEVELS if bool((sums == width * 127 * LEVELS).all()) else LEVELS // 2


def _multiply(u_RI: Tensor, packed: Tensor, scale_O: Tensor, zeros_O: Tensor) -> Tensor:
    """scale_O sum_i u_i q_i, (R, O) float32: integer sums, converted and multiplied once, the same in every batch."""
    return torch.ops.onednn.qlinear_pointwise(
        u_RI, 1.0, 0, packed, scale_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _is_usable(x: Tensor) -> bool:
    """Whether oneDNN has these products."""
    return x.device.type == "cpu" and is_fast(torch.int8, "cpu")


class CpuInt8Linear(Int8Linear):
    """By oneDNN. The weight is laid out for its products at the first one; a weight of no size stands in for it, and it
    is saved and moved as the original, bit for bit."""

    plain = Int8Linear
    packed: Tensor | None = None
    total_O: Tensor
    zeros_O: Tensor

    def pack(self) -> Tensor:
        """The weight as the products read it."""
        if self.packed is None:
            self.total_O = self.weight.sum(dim=1, dtype=torch.int32).float() * self.scale
            self.zeros_O = torch.zeros(self.out_features, dtype=torch.int32)
            self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)
        return self.packed

    def multiply_rows(self, x_RI: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        if not _is_usable(x_RI):
            return super().multiply_rows(x_RI, bias, gelu)
        parts = [
            finish(*self._sum_products(quantise(x, find_levels())), bias, gelu)
            for x in x_RI.split(max(1, _AT_ONCE // self.out_features))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def multiply_after_gelu(self, first: CpuInt8Linear, x: Tensor) -> Tensor:
        """This layer of tanh-GELU of another one's output, which is not written as floats; x (..., in of the other)."""
        if not _is_usable(x) or (torch.is_grad_enabled() and x.requires_grad):
            return self.multiply(first.multiply(x, first.bias, gelu=True), self.bias)
        levels, parts = find_levels(), []
        for x_RI in x.reshape(-1, first.in_features).split(max(1, _AT_ONCE // first.out_features)):
            hidden = finish_and_quantise(*first._sum_products(quantise(x_RI, levels)), first.bias, levels)
            parts.append(finish(*self._sum_products(hidden), self.bias, False))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], self.out_features)

    def _sum_products(self, rows: QuantisedRows) -> tuple[Tensor, QuantisedRows, Tensor]:
        """Products times the weight's scale (R, O), the rows, and the sum of each output's weights."""
        packed = self.pack()
        return _multiply(rows.u_RI, packed, self.scale, self.zeros_O), rows, self.total_O

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.packed is not None:
            self.weight, self.packed = nn.Parameter(self._unpack(), requires_grad=False), None
        return super()._apply(*arguments, **options)

    def _unpack(self) -> Tensor:
        assert self.packed is not None, "packed before"
        return self.packed.to_dense().T.contiguous()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self._unpack()
