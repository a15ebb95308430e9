"""The products of `nextscale.backends.cuda.tiles` as Triton kernels: a tile reads its rows where they are, multiplies
with its group's matrix, and writes or adds the result where it belongs. Nothing is gathered, and an empty tile ends at
once.

Sums are float32. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nextscale.backends.cuda.tiles import Activation, Tiles

_BLOCK_N, _BLOCK_K = 64, 32
_ACTIVATIONS: dict[str, int] = {"": 0, "relu": 1, "gelu": 2}


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDEN:  # the interpreter cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, out, row, bias, gate, group, start, end, N, K, stride_x, stride_m, stride_n, stride_k, stride_out,
    GATHERS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of rows by BLOCK_N columns of the output."""
    tile = tl.program_id(0)
    first, last = tl.load(start + tile), tl.load(end + tile)
    if first < last:
        m = tl.load(group + tile).to(tl.int64)
        place = first + tl.arange(0, ROWS)
        valid = place < last
        target = tl.load(row + place, mask=valid, other=0).to(tl.int64)
        place = place.to(tl.int64)
        source = target if GATHERS else place
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            a = tl.load(x + source[:, None] * stride_x + k, mask=valid[:, None] & (k < K)[None, :], other=0.0)
            at = weight + m * stride_m + n[None, :] * stride_n + k[:, None] * stride_k
            b = tl.load(at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
            acc = _dot(a, b, acc, PRECISION, WIDEN)
        if HAS_BIAS:
            acc += tl.load(bias + m * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == 1:
            acc = tl.maximum(acc, 0.0)
        if ACTIVATION == 2:  # tanh-GELU is x sigmoid(2 u)
            acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
        if HAS_GATE:
            acc *= tl.load(gate + place, mask=valid, other=0.0).to(tl.float32)[:, None]
        written = valid[:, None] & (n < N)[None, :]
        if GATHERS:
            tl.store(out + place[:, None] * stride_out + n[None, :], acc.to(out.dtype.element_ty), mask=written)
        else:
            tl.atomic_add(out + target[:, None] * stride_out + n[None, :], acc, mask=written)


@triton.jit
def _add_outer_products(  # type: ignore[no-untyped-def]
    g, x, out, ends, N, K, stride_g, stride_x,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of one group's matrix: the sum over the group's rows, some at a time."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.load(ends + m - 1, mask=m > 0, other=0)
    last = tl.load(ends + m)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for begin in range(first, last, ROWS):
        place = (begin + tl.arange(0, ROWS)).to(tl.int64)
        valid = place < last
        a = tl.load(g + place[None, :] * stride_g + n[:, None], mask=valid[None, :] & (n < N)[:, None], other=0.0)
        b = tl.load(x + place[:, None] * stride_x + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, WIDEN)
    at = out + m * N * K + n[:, None] * K + k[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


class TritonProducts:
    """The products by the kernels."""

    def multiply(
        self, x: Tensor, weight_MNK: Tensor, tiles: Tiles, row_R: Tensor, bias_MN: Tensor | None = None,
        activation: Activation = "", gate_R: Tensor | None = None, *, into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x, (_, N, K) = _make_rows_dense(x), weight_MNK.shape
        out = x.new_empty(len(row_R), N) if into is None else into
        bias = None if bias_MN is None else bias_MN.contiguous()
        grid = len(tiles.group_t), triton.cdiv(N, _BLOCK_N)
        with _select_device(x):
            _multiply[grid](
                x, weight_MNK, out, row_R, bias, gate_R, tiles.group_t, tiles.start_t, tiles.end_t, N, K,
                x.stride(0), *weight_MNK.stride(), out.stride(0),
                GATHERS=into is None, HAS_BIAS=bias is not None, HAS_GATE=gate_R is not None,
                ACTIVATION=_ACTIVATIONS[activation], ROWS=tiles.size, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
                **_choose_precision(x),
            )  # fmt: skip
        return out

    def add_outer_products(self, g_RN: Tensor, x_RK: Tensor, tiles: Tiles) -> Tensor:
        g_RN, x_RK, M = _make_rows_dense(g_RN), _make_rows_dense(x_RK), len(tiles.ends_M)
        N, K = g_RN.shape[1], x_RK.shape[1]
        out = x_RK.new_empty(M, N, K)
        grid = M, triton.cdiv(N, _BLOCK_N), triton.cdiv(K, _BLOCK_N)
        with _select_device(x_RK):
            _add_outer_products[grid](
                g_RN, x_RK, out, tiles.ends_M, N, K, g_RN.stride(0), x_RK.stride(0),
                ROWS=_BLOCK_K, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_N, **_choose_precision(x_RK),
            )  # fmt: skip
        return out


def _make_rows_dense(x: Tensor) -> Tensor:
    """x, or a copy whose rows have their values next to one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _select_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever tensors it is given."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _uses_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32")


def _choose_precision(x: Tensor) -> dict[str, object]:
    """float32 as torch's own products: TF32 where it is allowed."""
    rounded = x.is_cuda and _uses_tf32()
    return {"PRECISION": "tf32" if rounded else "ieee", "WIDEN": not x.is_cuda}
