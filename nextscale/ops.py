"""The few tensor operations under every layer, each with one contract.

On a CPU the result for one image must not depend on how many others share its batch, to the last bit. The library
kernels keep that promise but where they switch to another order of summation: matrix products of fewer than 12 rows
(MKL); convolutions of one small image (ATen leaves oneDNN below 20,481 values); and, on one thread, 1x1 convolutions
of fewer than 16 images. `linear` and `Conv2d` keep clear of those thresholds, which costs next to nothing. Measured
bitwise on an AMD EPYC with torch 2.13.0; tests/test_sampling.py holds it for whole images, on one and two threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_ROWS = 16
_SMALL_CONV = 20480


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out): the matrix product of every layer."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows >= _MIN_ROWS:
        return F.linear(x.contiguous(), weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, _MIN_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], weight.shape[0])


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
