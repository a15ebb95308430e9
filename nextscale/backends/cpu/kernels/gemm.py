"""The matrix products of a linear layer's gradients, on a CPU in float32, by the compiled kernel (gemm.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.backends.cpu.kernels import build

VECTORS = 2
"""Of a panel's columns: the sums of twelve rows (AVX2: six) by two vectors fill the registers."""
_DEPTH, _PANELS, _ROWS = 384, 8, 12
"""DEPTH, the panels of COLUMNS and at most ROWS of gemm.c."""


def multiply_matrices(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor | None:
    """The product (M, N) of two float32 matrices of any strides but those of `b_KN`'s rows, which are contiguous;
    written to `out`, contiguous, if it is given. None where there is no kernel. Autograd does not look inside.
    """
    (M, K), N = a_MK.shape, b_KN.shape[1]
    kernels = build.load_kernels("gemm", VECTORS)
    if kernels is None or b_KN.stride(1) != 1 or not (out is None or out.is_contiguous()):
        return None
    c_MN, threads = a_MK.new_empty(M, N) if out is None else out, torch.get_num_threads()
    if 0 in (M, N, K):
        return c_MN.zero_()
    rows = torch.empty((M + _ROWS) * _DEPTH)
    columns = torch.empty(threads * _PANELS * VECTORS * build.LANES * _DEPTH)
    kernels.gemm(
        a_MK.data_ptr(), b_KN.data_ptr(), c_MN.data_ptr(), *a_MK.stride(), b_KN.stride(0), M, N, K, threads,
        *build.get_pointers(rows, columns),
    )  # fmt: skip
    return c_MN
