"""Linear layers in 8 bits (W8A8): integer weights, and inputs that are rounded to integers row by row.

Weights are symmetric, one scale for each output: w = scale_O q, with q from -127 to 127. Inputs are asymmetric, a scale
and a lowest value for each row, which are found as the row comes: x = low_R + scale_R u, with u from 0 to `LEVELS`. The
product is a sum of integers, which is exact, and the layer's output

    y = scale_R (scale_O sum_i u_i q_i) + low_R (scale_O sum_i q_i) + bias.

A row's scale depends on that row alone, so an image does not depend on its batch. All else (norms, attention, the
residual stream, biases, embeddings) stays in float32. `LAYERS` lists which layers are quantised, docs/performance.md
what each costs in quality.

Letters: R rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.int8 import LEVELS, NO_GRADIENTS, quantise_weight
from nextscale.common.precision import choose_sampling_dtype, get_name

if TYPE_CHECKING:
    from nextscale.transformer.var import VAR

_T = "nextscale.transformer"
LAYERS: dict[str, tuple[str, ...]] = {
    f"{_T}.var:VAR": ("shared_adaln", "head_adaln", "head"),
    f"{_T}.block:AdaLN": ("linear",),
    f"{_T}.attention:Attention": ("qkv", "proj"),
    f"{_T}.scale_attention:ScaleAttention": ("qkv", "proj"),
    f"{_T}.cross_attention:CrossAttention": ("q", "kv", "proj"),
    f"{_T}.mamba:Mamba2": ("in_proj", "out_proj"),
    f"{_T}.feed_forward:DenseFeedForward": ("fc1", "fc2"),
    f"{_T}.feed_forward.experts:Experts": ("fc1", "fc2"),
}
"""Module -> its layers that are quantised. The others stay in float32: the word embedding, whose inputs have 32 values,
routers, which choose experts, feed-forwards divided into dynamic experts, whose kernels read slices of the weights, and
modules of your own, which may read theirs."""


@dataclass(frozen=True)
class QuantisedRows:
    """Rows (R, I) in 8 bits: x = low_R + scale_R u."""

    u_RI: Tensor
    """uint8."""
    scale_R: Tensor
    """float32, 0 or more; NaN for a row that is not finite."""
    low_R: Tensor
    """float32."""


def quantise_rows(x_RI: Tensor, levels: int = LEVELS) -> QuantisedRows:
    """Rows (R, I) of floats in integers from 0 to `levels`, each row from its smallest to its largest value."""
    x_RI = x_RI.float()
    low_R, high_R = torch.aminmax(x_RI, dim=-1)
    scale_R = (high_R - low_R) / levels
    u_RI = ((x_RI - low_R[:, None]) / torch.where(scale_R == 0, 1, scale_R)[:, None]).round()
    return QuantisedRows(u_RI.clamp(0, levels).to(torch.uint8), scale_R, low_R)


def multiply_rows(
    x_RI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """A layer in 8 bits of rows (R, I), by torch's float64 products, which are exact for integers of this size."""
    rows, weight = quantise_rows(x_RI), weight_OI.double()
    y_RO = (rows.u_RI.double() @ weight.T).float() * scale_O * rows.scale_R[:, None]
    y_RO += rows.low_R[:, None] * (weight.sum(dim=1).float() * scale_O)
    y_RO = y_RO if bias_O is None else y_RO + bias_O
    return F.gelu(y_RO, approximate="tanh") if gelu else y_RO


class Int8Module(nn.Module):
    """What has a `weight` in 8 bits, int8 (..., out, in), its `scale`, float32 (..., out), and perhaps a `bias`."""

    def __init__(self, shape: Sequence[int], bias: bool = True):
        super().__init__()
        *outer, self.in_features = shape
        self.out_features = outer[-1]
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(outer), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outer), requires_grad=False) if bias else None

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        moved = super()._apply(*arguments, **options)
        if self.scale.dtype != torch.float32:
            raise UserError(f"a model with linear layers in int8 cannot be converted to {get_name(self.scale.dtype)}")
        return moved

    def train(self, mode: bool = True) -> Int8Module:
        if mode:
            raise UserError(NO_GRADIENTS)
        return super().train(mode)

    def check_gradients(self, x: Tensor) -> None:
        """Raise UserError where gradients are asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(NO_GRADIENTS)


class Int8Linear(Int8Module):
    """A linear layer in 8 bits: weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """x (..., in) times the weight transposed, plus a bias that need not be the layer's, then tanh-GELU if `gelu`;
        float32."""
        self.check_gradients(x)
        y_RO = multiply_rows(x.reshape(-1, self.in_features), self.weight, self.scale, bias, gelu)
        return y_RO.view(*x.shape[:-1], self.out_features)


class Int8StackedLinear(Int8Module):
    """The linear layers of several experts in 8 bits: weight (M, out, in), bias (M, out)."""

    bias: Tensor  # type: ignore[assignment]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.multiply(x, expert)

    def multiply(self, x: Tensor, expert: int, gelu: bool = False) -> Tensor:
        """The layer of one expert for rows (r, in), then tanh-GELU if `gelu`."""
        self.check_gradients(x)
        return multiply_rows(x, self.weight[expert], self.scale[expert], self.bias[expert], gelu)


def quantise_model(model: VAR, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Quantise a transformer, or keep one that is; the types of its other weights and of its tokenizer's decoder.

    UserError for a `dtype` other than int8, which a model in 8 bits cannot be given, and for another device than a CPU.
    """
    if dtype != torch.int8:
        raise UserError(
            f"this model's linear layers are in int8, which cannot be turned back to {get_name(dtype)}; use dtype auto "
            "or int8, or the model that it was made from"
        )
    if device.type != "cpu":
        raise UserError(f"dtype int8 runs on a CPU alone, not on {device.type}; use dtype auto")
    quantise_layers(model)
    return torch.float32, choose_sampling_dtype("auto", device, model.config.width)


def quantise_layers(model: nn.Module, layers: Mapping[str, Sequence[str]] = LAYERS) -> nn.Module:
    """Replace these layers inside a transformer or a part of it by their quantised forms, in place; returns it.

    On the meta device the new layers have shapes alone, to be filled with `load_state_dict(assign=True)`.
    """
    for parent, name in list(_list_layers(model, layers)):  # whose weights are freed one after another
        tensors = getattr(parent, name).state_dict()  # of fast modules, too, in the usual layout
        weight, bias = tensors["weight"], tensors.get("bias")
        with torch.device(weight.device):
            layer = (Int8Linear if weight.ndim == 2 else Int8StackedLinear)(weight.shape, bias=bias is not None)
        if not weight.is_meta:
            layer.weight.data, layer.scale.data = quantise_weight(weight)
            if bias is not None:
                layer.bias = nn.Parameter(bias.float(), requires_grad=False)
        setattr(parent, name, layer)
    return model


def count_int8_layers(model: nn.Module) -> int:
    """How many of the model's layers are in 8 bits."""
    return sum(isinstance(module, Int8Module) for module in model.modules())


def find_plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a fast twin, its plain class."""
    plain: type[nn.Module] = getattr(type(module), "plain", type(module))
    return plain


def _list_layers(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of each layer to quantise."""
    for module in model.modules():
        kind = find_plain_class(module)
        for name in layers.get(f"{kind.__module__}:{kind.__qualname__}", ()):
            if not isinstance(getattr(module, name), Int8Module | None):
                yield module, name
