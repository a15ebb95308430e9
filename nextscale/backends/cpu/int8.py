"""Fast twin of linear layers in 8 bits: oneDNN's products of integers, compiled kernels around them.

Letters: R rows, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.kernels.int8 import finish, finish_and_quantise, quantise
from nextscale.common.precision import is_fast
from nextscale.transformer.int8 import LEVELS, Int8Linear, Int8Module, Int8StackedLinear, QuantisedRows

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
    """Whether oneDNN computes this product."""
    return x.device.type == "cpu" and is_fast(torch.int8, "cpu")


@dataclass(frozen=True)
class _Weight:
    """A weight (O, I) as the products read it."""

    packed: Tensor
    scale_O: Tensor
    total_O: Tensor
    """The sum of each output's weights."""
    zeros_O: Tensor

    @staticmethod
    def pack(weight_OI: Tensor, scale_O: Tensor) -> _Weight:
        total_O = weight_OI.sum(dim=1, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
        return _Weight(packed, scale_O, total_O.float() * scale_O, torch.zeros_like(total_O))

    def unpack(self) -> Tensor:
        return self.packed.to_dense().T.contiguous()

    def sum_products(self, rows: QuantisedRows) -> tuple[Tensor, QuantisedRows, Tensor]:
        """Products times the weight's scale (R, O), the rows, and `total_O`."""
        return _multiply(rows.u_RI, self.packed, self.scale_O, self.zeros_O), rows, self.total_O

    def multiply(self, x_RI: Tensor, bias_O: Tensor | None, gelu: bool) -> Tensor:
        """The layer of rows (R, I), some at a time."""
        levels, parts = find_levels(), x_RI.split(max(1, _AT_ONCE // len(self.scale_O)))
        return _join([finish(*self.sum_products(quantise(x, levels)), bias_O, gelu) for x in parts])

    def multiply_after_gelu(
        self, first: _Weight, first_bias: Tensor | None, x_RI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        """This layer of tanh-GELU of another one's output, which is not written as floats."""
        levels, parts = find_levels(), []
        for x in x_RI.split(max(1, _AT_ONCE // len(first.scale_O))):
            hidden = finish_and_quantise(*first.sum_products(quantise(x, levels)), first_bias, levels)
            parts.append(finish(*self.sum_products(hidden), bias_O, False))
        return _join(parts)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PackedInt8Module(Int8Module):
    """Lays its weights out for the products at the first one. A weight of no size stands in for them; they are saved
    and moved as the original, bit for bit."""

    packed: list[_Weight] | None = None

    def pack(self) -> list[_Weight]:
        """The weights as the products read them, one or one for each expert."""
        if self.packed is None:
            weights, scales = self.weight.view(-1, *self.weight.shape[-2:]), self.scale.view(-1, self.out_features)
            self.packed = [_Weight.pack(*pair) for pair in zip(weights, scales, strict=True)]
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)
        return self.packed

    def _unpack(self) -> Tensor:
        assert self.packed is not None, "packed before"
        return torch.stack([weight.unpack() for weight in self.packed]).view(*self.scale.shape, self.in_features)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.packed is not None:
            self.weight, self.packed = nn.Parameter(self._unpack(), requires_grad=False), None
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self._unpack()


class CpuInt8Linear(PackedInt8Module, Int8Linear):
    """A linear layer in 8 bits by oneDNN."""

    plain = Int8Linear

    def multiply(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        if not _is_usable(x):
            return super().multiply(x, bias, gelu)
        self.check_gradients(x)
        y_RO = self.pack()[0].multiply(x.reshape(-1, self.in_features), bias, gelu)
        return y_RO.view(*x.shape[:-1], self.out_features)

    def multiply_after_gelu(self, first: CpuInt8Linear, x: Tensor) -> Tensor:
        """This layer of tanh-GELU of another one's output, x being (..., in of the other)."""
        if not _is_usable(x):
            return self.multiply(first.multiply(x, first.bias, gelu=True), self.bias)
        self.check_gradients(x)
        rows = x.reshape(-1, first.in_features)
        y_RO = self.pack()[0].multiply_after_gelu(first.pack()[0], first.bias, rows, self.bias)
        return y_RO.view(*x.shape[:-1], self.out_features)


class CpuInt8StackedLinear(PackedInt8Module, Int8StackedLinear):
    """The linear layers of experts in 8 bits by oneDNN."""

    plain = Int8StackedLinear

    def multiply(self, x: Tensor, expert: int, gelu: bool = False) -> Tensor:
        if not _is_usable(x):
            return super().multiply(x, expert, gelu)
        self.check_gradients(x)
        return self.pack()[expert].multiply(x, self.bias[expert], gelu)

    def multiply_after_gelu(self, first: CpuInt8StackedLinear, x: Tensor, expert: int) -> Tensor:
        """As that of `CpuInt8Linear`, of one expert."""
        if not _is_usable(x):
            return self.multiply(first.multiply(x, expert, gelu=True), expert)
        self.check_gradients(x)
        first_weight, first_bias = first.pack()[expert], first.bias[expert]
        return self.pack()[expert].multiply_after_gelu(first_weight, first_bias, x, self.bias[expert])
