"""Linear layers with weights of 16 bits on a CPU that computes them in float32, by the compiled kernel (linear.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nextscale.backends.cpu.kernels import build

_ROWS = 224
"""Rows that the kernel takes at once, at most."""


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor | None:
    """x (..., in), float32, times a weight (out, in) of 16 bits transposed, plus a bias (out); tanh-GELU if `gelu`.

    None where no kernel can be used.
    """
    if not build.can_use_kernels(x, weight, converts=True):
        return None
    kernels = build.load_kernels("linear", build.MAX_VECTORS)
    return None if kernels is None else run(kernels, x, weight, bias, gelu)


def run(kernels: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """`multiply` by the kernels."""
    outputs, depth = weight.shape
    x, weight = x.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    y, threads = x.new_empty(*x.shape[:-1], outputs), torch.get_num_threads()
    sums = torch.empty(threads * _ROWS * build.MAX_VECTORS * build.LANES)
    bias = None if bias is None else bias.float().contiguous()
    kernels.multiply(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), x.numel() // depth,
        depth, outputs, weight.stride(0), int(gelu), build.TYPES[weight.dtype], threads, sums.data_ptr(),
    )  # fmt: skip
    return y
