"""Matrix products on a CPU.

The result for one row does not depend on the rows beside it, to the last bit (see `nextscale.backends.optimize`). The
libraries keep that promise except where they switch to another order of summation: MKL for products of fewer than 12
rows, oneDNN for a single row. `linear` keeps clear of both, which costs next to nothing. Measured bitwise on an AMD
EPYC with torch 2.13.0; tests/test_sampling.py checks it for whole images, on one and two threads.

oneDNN's own products (x86) are faster. `linear` uses them in inference, faster still where a weight was packed, and on
some CPUs in training, in float32, forward and backward.
"""

from __future__ import annotations

import platform
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.backends.cpu.activations import compute_gelu
from nextscale.backends.cpu.kernels.linear import multiply
from nextscale.backends.cpu.kernels.training import apply_gelu, trains_in_float32
from nextscale.common.errors import UserError
from nextscale.common.precision import is_computed_in_float32, is_fast, is_x86

_MIN_ROWS = 16
_PACKED_FOR = 64
"""Rows that oneDNN lays a packed weight out for: with any number but 0 the layout is good from 2 rows to thousands."""
PACK_ROWS = 32
"""A weight is packed at its first product with at least so many rows; the first scales have fewer."""
_CONVERTED_VALUES = 2**20
"""Values of a weight that are converted to float32 at once: 4 MiB, which stay in a third cache. Of less, each product
takes longer: with 1 MiB and 8 rows 1.6 times as long as in float32, with 4 MiB 1.2 times (AVX2, 4,096 to 1,024)."""
_local = threading.local()
_PRODUCT_ROWS = 128
"""In training oneDNN's product is the faster one from this number of rows on, and this one of values of a weight."""
_PRODUCT_VALUES = 2**18
"""Of smaller weights torch's gradients are the faster ones (benchmarks/products.py --width 64): oneDNN lays out its
operands anew for each product."""

UNPACKED = 'load them with Pipeline.from_pretrained(..., backend="plain")'
NO_GRADIENTS = f"these weights are packed for inference and give no gradients; {UNPACKED}"
NOT_TRAINABLE = f"weights that are packed for inference cannot be trained; {UNPACKED}"

has_onednn = torch.backends.mkldnn.is_available() and is_x86() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

wide_vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether the CPU has AVX-512."""


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor())


trains_by_onednn = has_onednn and wide_vectors and not _is_intel()
"""Whether oneDNN's products are the faster ones in training: not without AVX-512, nor on Intel's own CPUs, where MKL
reaches 155 to 165 GFLOP/s a core and oneDNN 95 to 150 (benchmarks/products.py)."""


@lru_cache(maxsize=1)
def list_onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes in which oneDNN's products are fast on this machine; empty without oneDNN."""
    if not has_onednn:
        return ()
    return (torch.float32, torch.bfloat16) if is_fast(torch.bfloat16, "cpu") else (torch.float32,)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`F.linear(x, weight, bias)`, followed by tanh-GELU if `gelu`. x (..., in), weight (out, in), bias (out)."""
    if is_computed_in_float32(weight):
        y = multiply(x.float(), weight, bias, gelu)
        return _linear_converted(x.float(), weight, bias, gelu) if y is None else y
    if _use_onednn(x, weight):
        return _linear_onednn(x, weight, bias, gelu)
    rows = x.numel() // x.shape[-1]
    if _needs_gradient(x, weight) and _onednn_trains_faster(rows, x, weight):
        y = _DifferentiableProduct.apply(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], weight.shape[0])
    elif x.device.type != "cpu" or rows >= _MIN_ROWS:
        y = F.linear(x.contiguous(), weight, bias)
    else:
        padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, _MIN_ROWS - rows))
        y = F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], weight.shape[0])
    if not gelu:
        return y
    differentiable = torch.is_grad_enabled() and y.requires_grad
    if differentiable and (a := apply_gelu(y)) is not None:
        return a
    plain = differentiable or y.dtype != torch.float32 or y.device.type != "cpu" or torch.compiler.is_compiling()
    return F.gelu(y, approximate="tanh") if plain else compute_gelu(y)


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product of inference that oneDNN computes."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if weight.is_mkldnn:
        if gradient:
            raise UserError(NO_GRADIENTS)
        return True
    if gradient or x.device.type != "cpu" or x.dtype != weight.dtype or weight.dtype not in list_onednn_dtypes():
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def _linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """`linear` by oneDNN. A row has the same bits whatever rows are beside it, with packed and unpacked weights."""
    rows_RI = x.reshape(-1, x.shape[-1]).contiguous()  # the operator passes other layouts to another library
    rows = len(rows_RI)
    if rows == 1:  # a single row would be summed in another order
        rows_RI = torch.cat((rows_RI, rows_RI))
    fused = gelu and wide_vectors  # without, GELU is faster by itself
    y = torch.ops.mkldnn._linear_pointwise(
        rows_RI, weight, bias, "gelu" if fused else "none", [], "tanh" if fused else ""
    )[:rows].view(*x.shape[:-1], weight.shape[0])
    return compute_gelu(y) if gelu and not fused else y


def _linear_converted(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """`linear` in float32 with a weight of 16 bits, without the compiled kernel. Some rows are converted at a time: the
    whole weight is read from memory once, in half of float32's bytes."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    size = max(_CONVERTED_VALUES // weight.shape[1], _MIN_ROWS)
    biases = [None] * -(-len(weight) // size) if bias is None else bias.float().split(size)
    convert = Tensor.float if gradient else _convert_in_place
    parts = [linear(x, convert(w), b, gelu) for w, b in zip(weight.split(size), biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _convert_in_place(weight: Tensor) -> Tensor:
    """A weight of at most `_CONVERTED_VALUES` in float32, in memory that the thread's next call overwrites: new memory
    costs as much as a product of few rows."""
    count, buffer = weight.numel(), getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < count:
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(max(count, _CONVERTED_VALUES))
    return buffer[:count].view(weight.shape).copy_(weight)


# ---- packed weights


def can_pack(weight: Tensor) -> bool:
    """Whether packing this weight is possible and faster: on x86 in float32, and in bfloat16 where that is fast."""
    return weight.device.type == "cpu" and weight.dtype in list_onednn_dtypes() and not weight.is_mkldnn


def pack_weight(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in), for `linear` alone, laid out in memory as oneDNN's products read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR)


def unpack_weight(weight: Tensor) -> Tensor:
    """The weight (out, in) in its usual layout, packed or not."""
    return weight.to_dense() if weight.is_mkldnn else weight


# ---- products of training


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether this product will be differentiated, in float32."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and weight.dtype == torch.float32


class _DifferentiableProduct(torch.autograd.Function):
    """x (R, in) times weight (out, in) transposed, plus bias, forward and backward by oneDNN.

    The fastest operators differ: the gradient of x is computed as that of a 1x1 convolution, of one image with a pixel
    for each row and the channels last in memory; the gradient of the weight as that of an inner product.
    benchmarks/products.py measures them.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight)
        return multiply_rows(x_RI, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RI, weight = ctx.saved_tensors
        dy_RO = gradients[0].contiguous()
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            compute_input_gradient(dy_RO, weight, x_RI) if dx else None,
            compute_weight_gradient(dy_RO, x_RI, weight) if dweight else None,
            dy_RO.sum(dim=0) if dbias else None,
        )


def multiply_rows(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x times weight transposed, plus bias, for use inside an autograd function (autograd does not look inside)."""
    if not _onednn_trains_faster(len(x_RI), x_RI, weight_OI):
        return F.linear(x_RI, weight_OI, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


def compute_input_gradient(dy_RO: Tensor, weight_OI: Tensor, x_RI: Tensor) -> Tensor:
    """Gradient of x in x times weight transposed: dy times weight, (R, I)."""
    if not _onednn_trains_faster(len(dy_RO), dy_RO, weight_OI):
        return dy_RO @ weight_OI
    return torch.ops.aten.convolution_backward(
        _view_as_pixels(dy_RO), _view_as_pixels(x_RI), weight_OI[:, :, None, None], None,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False],
    )[0].permute(0, 2, 3, 1).reshape(x_RI.shape)  # fmt: skip


def compute_weight_gradient(dy_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the weight in x times weight transposed: dy transposed times x, (O, I); written to `out` if given."""
    if not _onednn_trains_faster(len(dy_RO), dy_RO, weight_OI):
        return torch.mm(dy_RO.T, x_RI, out=out)
    operands = dy_RO.to_mkldnn(), x_RI.to_mkldnn()
    gradient = torch.ops.aten.mkldnn_linear_backward_weights(*operands, weight_OI, False)[0].to_dense()
    return gradient if out is None else out.copy_(gradient)


def _onednn_trains_faster(rows: int, x: Tensor, weight_OI: Tensor) -> bool:
    """Whether products of training with so many rows are faster by oneDNN: large ones in float32 on some CPUs."""
    large = rows >= _PRODUCT_ROWS and weight_OI.numel() >= _PRODUCT_VALUES
    return large and trains_by_onednn and trains_in_float32(x)


def _view_as_pixels(x_RI: Tensor) -> Tensor:
    """Rows (R, I) as one image (1, I, R, 1) whose channels are last in memory."""
    return x_RI.view(1, -1, 1, x_RI.shape[-1]).permute(0, 3, 1, 2)
