"""Fast twins of linear layers and of the dense feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.products import NOT_TRAINABLE, PACK_ROWS, can_pack, linear, pack_weight, unpack_weight
from nextscale.common.errors import UserError
from nextscale.common.precision import Float32Linear
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import DenseFeedForward


class CpuLinear(nn.Linear):
    """nn.Linear by `products.linear`, for training and inference."""

    plain = nn.Linear
    converts_weight = True
    """Whether a weight of 16 bits is converted at its use, see `nextscale.backends.cpu.conversion`."""

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """x (..., in) times the weight transposed, plus a bias that need not be the layer's, then tanh-GELU if
        `gelu`."""
        return linear(x, self.weight, bias, gelu)


class PackedLinear(CpuLinear):
    """For inference: the weight is laid out in memory as oneDNN's products read it, at the first large product.

    A packed weight replaces the original. It is saved, moved and converted like any other, bit for bit, but gives no
    gradients. Packing waits for the first product that gains by it, so that a new process starts at once.
    """

    def multiply(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        if not self.weight.is_mkldnn and x.numel() >= PACK_ROWS * x.shape[-1]:
            self.pack()
        return linear(x, self.weight, bias, gelu)

    def pack(self) -> None:
        """Pack the weight where that is possible."""
        if can_pack(self.weight):
            self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)

    def train(self, mode: bool = True) -> PackedLinear:
        if mode:
            raise UserError(NOT_TRAINABLE)
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(unpack_weight(self.weight), requires_grad=False)
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = unpack_weight(self.weight)


class CpuFloat32Linear(Float32Linear):
    """Float32Linear by `products.linear`. Its weight is small and stays as it is."""

    plain = Float32Linear

    def forward(self, input: Tensor) -> Tensor:
        return linear(input.float(), self.weight.float(), self.bias)


class CpuDenseFeedForward(DenseFeedForward):
    """The dense feed-forward with GELU fused into the first product."""

    plain = DenseFeedForward

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Any = None) -> tuple[Tensor, None]:
        if chain := find_chain(self.fc1, self.fc2):
            return chain(self.fc1, x_BND), None
        return self.fc2(apply_gelu_linear(self.fc1, x_BND)), None


def find_chain(first: nn.Module, second: nn.Module) -> Callable[..., Tensor] | None:
    """For two layers in 8 bits what computes both and the tanh-GELU between them, see `nextscale.backends.cpu.int8`."""
    chains = [getattr(layer, "multiply_after_gelu", None) for layer in (first, second)]
    return chains[1] if all(chains) else None


def apply_gelu_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """tanh-GELU of a linear layer's output, fused where the layer can."""
    if isinstance(layer, CpuLinear):
        return layer.multiply(x, layer.bias, gelu=True)
    return F.gelu(layer(x), approximate="tanh")
