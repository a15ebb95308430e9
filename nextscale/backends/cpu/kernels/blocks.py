"""What a block does between its products, on a CPU in float32, by the compiled kernels (blocks.c).

Each function gives None where no kernel can be used, and its caller goes the plain way to the same function: in
training, on other devices, in 16 bits, for heads of other widths, without a compiler, AVX-512, AVX2 or NEON.

Letters: B batch, N tokens at hand, L tokens that a cache has room for, H heads, d head width, D width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.compilation import HEADS

AT_ONCE = 256
"""Keys that are scored at once: their scores, 64 KiB for heads of 64, they and their values stay in the second cache.
With all keys at once 4,096 queries and 9,451 keys took 1.7 times as long as torch's operator, so they take 0.9."""


def attend(
    qkv_BN3Hd: Tensor, caches: tuple[Tensor, Tensor] | None, start: int, lengths_H: Tensor, normalise: bool
) -> Tensor | None:
    """Softmax attention of one scale (B, N, H d) to itself and to the `start` tokens before it.

    `caches`: keys and values (B, H, L, d), to which the scale's own are added if there is room; None: nothing comes
    before. `lengths_H`: what multiplies queries, float32; with `normalise` queries and keys have length 1 before.
    """
    B, N, _, H, d = qkv_BN3Hd.shape
    kernels = build.load_kernels("blocks", d) if d in HEADS and build.can_use_kernels(qkv_BN3Hd, lengths_H) else None
    if kernels is None or not qkv_BN3Hd.is_contiguous():
        return None
    lengths_H = lengths_H.contiguous()  # a copy must live until the kernel has ended
    k_BHLd, v_BHLd = caches if caches is not None else (qkv_BN3Hd.new_empty(B, H, 0, d),) * 2
    y_BND, threads, seen = qkv_BN3Hd.new_empty(B, N, H * d), torch.get_num_threads(), start + N
    scratch = torch.empty(threads * (d + AT_ONCE + N + seen) * d)
    pointers = torch.empty(threads * seen, dtype=torch.int64)
    kernels.attend(
        *build.get_pointers(qkv_BN3Hd, k_BHLd, v_BHLd, lengths_H, y_BND),
        B, H, N, start, k_BHLd.shape[2], N, AT_ONCE, int(normalise), threads, None,
        *build.get_pointers(scratch, pointers),
    )  # fmt: skip
    return y_BND


def modulate(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor | None:
    """LN(x) (1 + scale) + shift in one pass, with a LayerNorm that has no weights of its own, (B, N, D)."""
    if not build.can_use_kernels(x_BND, scale_B1D) or not can_walk_rows(x_BND, scale_B1D, shift_B1D):
        return None
    kernels = build.load_kernels("blocks", HEADS[-1])
    return None if kernels is None else modulate_rows(kernels, x_BND, scale_B1D, shift_B1D, eps)


def can_walk_rows(x_BND: Tensor, *of_images_B1D: Tensor) -> bool:
    """Whether kernels can read these: rows that fill vectors, and for each image a row, laid out alike in all."""
    first = of_images_B1D[0]
    if not build.LANES or x_BND.shape[-1] % build.LANES or not x_BND.is_contiguous():
        return False
    return all(t.stride() == first.stride() and t.stride(2) == 1 and len(t) == len(x_BND) for t in of_images_B1D)


def modulate_rows(
    kernels: ctypes.CDLL, x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float
) -> Tensor:  # fmt: skip
    """`modulate` with inputs that `can_walk_rows` and without a gradient."""
    y_BND = torch.empty_like(x_BND)
    kernels.modulate(
        x_BND.data_ptr(), scale_B1D.data_ptr(), shift_B1D.data_ptr(), y_BND.data_ptr(),
        *x_BND.shape, scale_B1D.stride(0), eps, torch.get_num_threads(),
    )  # fmt: skip
    return y_BND
