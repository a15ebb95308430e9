"""The few tensor operations under every layer, each with one contract.

On a CPU the result for one image must not depend on how many others share its batch, to the last bit. The library
kernels keep that promise but where they switch to another order of summation: matrix products of fewer than 12 rows
(MKL); convolutions of one small image (ATen leaves oneDNN below 20,481 values); and, on one thread, 1x1 convolutions
of fewer than 16 images. `linear` and `Conv2d` keep clear of those thresholds, which costs next to nothing. Measured
bitwise on an AMD EPYC with torch 2.13.0; tests/test_sampling.py holds it for whole images, on one and two threads.

In training that promise is not needed, and there `linear` takes oneDNN's road in float32 on x86: the product as a 1x1
convolution over the rows, forward and backward. NEXTSCALE_PLAIN=1 turns all fast paths off.
"""

from __future__ import annotations

import os
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_ROWS = 16
_SMALL_CONV = 20480
_CONVOLVED_ROWS = 128
"""From here on the product as a convolution is the faster one."""

fast = not os.environ.get("NEXTSCALE_PLAIN")
"""Whether fast paths are taken where there are any; the plain ones compute the same function."""
has_onednn = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out): the matrix product of every layer."""
    rows = x.numel() // x.shape[-1]
    if fast and has_onednn and rows >= _CONVOLVED_ROWS and _trains(x, weight):
        return _convolved(x, weight, bias)
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
    return x.dtype == weight.dtype == torch.float32 and (x.requires_grad or weight.requires_grad)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as a 1x1 convolution of one image, a pixel for each row, with the channels last in memory."""
    pixels_1IR1 = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y_1OR1 = F.conv2d(pixels_1IR1, weight[:, :, None, None], bias)
    return y_1OR1.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


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
