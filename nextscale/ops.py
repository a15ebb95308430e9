"""The few tensor operations under every layer, each with one contract.

On a CPU the result for one image must not depend on how many others share its batch, to the last bit. The library
kernels keep that promise but where they switch to another order of summation: matrix products of fewer than 12 rows
(MKL); convolutions of one small image (ATen leaves oneDNN below 20,481 values); and, on one thread, 1x1 convolutions
of fewer than 16 images. `linear` and `Conv2d` keep clear of those thresholds, which costs next to nothing. Measured
bitwise on an AMD EPYC with torch 2.13.0; tests/test_sampling.py holds it for whole images, on one and two threads.

In training that promise is not needed, and there `linear` takes oneDNN's road in float32 on x86, forward and backward.
NEXTSCALE_PLAIN=1 turns all fast paths off.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_ROWS = 16
_SMALL_CONV = 20480
_PRODUCT_ROWS = 128
"""From here on oneDNN's product is the faster one."""

fast = not os.environ.get("NEXTSCALE_PLAIN")
"""Whether fast paths are taken where there are any; the plain ones compute the same function."""
has_onednn = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out): the matrix product of every layer."""
    rows = x.numel() // x.shape[-1]
    if fast and has_onednn and rows >= _PRODUCT_ROWS and _trains(x, weight):
        y = _Product.apply(x.reshape(rows, -1), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    if x.device.type != "cpu" or rows >= _MIN_ROWS:
        return F.linear(x.contiguous(), weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, _MIN_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], weight.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v for queries (B, H, N, d), keys and values (B, H, M, d), where `mask` (N, M) is True.

    In training in 16 bits on a CPU the scores are written out: there torch's fused kernel takes two to four times as
    long, most of it in the backward pass.
    """
    low = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (fast and low and q.device.type == "cpu" and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores_BHNM = torch.matmul(q * scale if scale != 1 else q, k.transpose(-1, -2))
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores_BHNM.softmax(dim=-1), v)


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a float32 product on a CPU that will be differentiated."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # the compiler chooses products of its own
        return False
    return x.dtype == weight.dtype == torch.float32 and (x.requires_grad or weight.requires_grad)


class _Product(torch.autograd.Function):
    """x (R, in) times weight (out, in) transposed, plus bias, forward and backward by oneDNN.

    What is fastest differs: the gradient of x is a 1x1 convolution's, of one image with a pixel for each row and the
    channels last in memory; that of the weight an inner product's. benchmarks/products.py measures them.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight)
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RI, weight = ctx.saved_tensors
        dy_RO = gradients[0].contiguous()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                _pixels(dy_RO), _pixels(x_RI), weight[:, :, None, None], None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False],
            )[0].permute(0, 2, 3, 1).reshape(x_RI.shape)  # fmt: skip
        if ctx.needs_input_grad[1]:
            operands = dy_RO.to_mkldnn(), x_RI.to_mkldnn()
            dweight = torch.ops.aten.mkldnn_linear_backward_weights(*operands, weight, False)[0].to_dense()
        if ctx.needs_input_grad[2]:
            dbias = dy_RO.sum(dim=0)
        return dx, dweight, dbias


def _pixels(x_RI: Tensor) -> Tensor:
    """Rows (R, I) as one image (1, I, R, 1) whose channels are last in memory."""
    return x_RI.view(1, -1, 1, x_RI.shape[-1]).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """nn.Linear over `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose result for an image is the same alone and in a batch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if self.kernel_size == (1, 1) and self.stride == (1, 1):
            y = linear(x.flatten(2).transpose(1, 2), self.weight[:, :, 0, 0], self.bias)
            return y.transpose(1, 2).unflatten(2, x.shape[-2:]).contiguous()
        if x.shape[0] == 1 and x.numel() <= _SMALL_CONV:
            return super().forward(torch.cat((x, x)))[:1]
        return super().forward(x)


def shrink(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Area down-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="area")


def enlarge(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Bicubic up-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="bicubic")
