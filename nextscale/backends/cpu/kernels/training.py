"""What a training step computes beside its products, on a CPU in float32, by compiled kernels (training.c, blocks.c).

Each function gives None where no kernel can be used, and its caller goes the plain way to the same function.

Letters: B batch, L tokens of all scales, H heads, d head width, D width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.blocks import AT_ONCE
from nextscale.backends.cpu.kernels.compilation import HEADS

Spans = tuple[tuple[int, int], ...]


def attend_scales(qkv_BL3Hd: Tensor, spans: Spans, lengths_H: Tensor, normalise: bool) -> Tensor | None:
    """Softmax attention (B, L, H d) of all scales, each to itself and to those before it, with gradients.

    `spans`: where scales begin and end. `lengths_H`: what multiplies queries; with `normalise` queries and keys have
    length 1 before.
    """
    d = qkv_BL3Hd.shape[-1]
    if d not in HEADS or not (trains_in_float32(qkv_BL3Hd) and trains_in_float32(lengths_H)):
        return None
    if spans[0][0] or spans[-1][1] != qkv_BL3Hd.shape[1]:
        return None
    kernels = build.load_kernels("blocks", d), build.load_kernels("training", d)
    if None in kernels:
        return None
    return _ScaleAttention.apply(qkv_BL3Hd, lengths_H, spans, normalise, kernels)


def apply_gelu(x: Tensor) -> Tensor | None:
    """tanh-GELU with a gradient."""
    kernels = build.load_kernels("training", HEADS[-1]) if trains_in_float32(x) else None
    return None if kernels is None else _Gelu.apply(x, kernels)


def trains_in_float32(x: Tensor) -> bool:
    """Whether these values are float32 on a CPU, outside of autocast and compilation."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()  # the compiler has products and kernels of its own


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: ctypes.CDLL) -> Tensor:
        x, ctx.kernels = x.contiguous(), kernels
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        kernels.gelu_or_gradient(x.data_ptr(), None, y.data_ptr(), x.numel(), torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), dy = ctx.saved_tensors, gradients[0].contiguous()
        dx = torch.empty_like(x)
        ctx.kernels.gelu_or_gradient(*build.get_pointers(x, dy, dx), x.numel(), torch.get_num_threads())
        return dx, None


class _ScaleAttention(torch.autograd.Function):
    """Scores are not stored but computed again in the backward pass, from the normalised keys."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BL3Hd: Tensor, lengths_H: Tensor, spans: Spans, normalise: bool,
        kernels: tuple[ctypes.CDLL, ctypes.CDLL],
    ) -> Tensor:  # fmt: skip
        qkv, lengths = qkv_BL3Hd.contiguous(), lengths_H.contiguous()
        B, L, _, H, d = qkv.shape
        keys, values, softmax = qkv.new_empty(B, H, L, d), qkv.new_empty(B, H, L, d), qkv.new_empty(B, H, L, 2)
        y_BLD, threads = qkv.new_empty(B, L, H * d), torch.get_num_threads()
        scratch = torch.empty(threads * (d + AT_ONCE + L) * d)
        pointers = torch.empty(threads * L, dtype=torch.int64)
        for start, end in spans:
            kernels[0].attend(
                qkv[:, start:].data_ptr(), *build.get_pointers(keys, values, lengths), y_BLD[:, start:].data_ptr(),
                B, H, end - start, start, L, L, AT_ONCE, int(normalise), threads, softmax[:, :, start:].data_ptr(),
                *build.get_pointers(scratch, pointers),
            )  # fmt: skip
        ctx.save_for_backward(qkv, keys, lengths, y_BLD, softmax)
        ctx.spans, ctx.normalise, ctx.kernels = spans, normalise, kernels[1]
        return y_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, keys, lengths, y_BLD, softmax = ctx.saved_tensors
        B, L, _, H, d = qkv.shape
        dqkv, dlengths_BH, threads = torch.empty_like(qkv), qkv.new_empty(B, H), torch.get_num_threads()
        ends = torch.tensor([0, *(end for _, end in ctx.spans)])
        scratch = torch.empty(threads * (d * 2 * (d + AT_ONCE) + L * d))  # a panel has up to d columns
        pointers = torch.empty(threads * 2 * L, dtype=torch.int64)
        ctx.kernels.attend_gradient(
            *build.get_pointers(qkv, keys, lengths, y_BLD, softmax, gradients[0].contiguous(), dqkv, dlengths_BH, ends),
            len(ctx.spans), B, H, L, AT_ONCE, int(ctx.normalise), threads, *build.get_pointers(scratch, pointers),
        )  # fmt: skip
        return dqkv, dlengths_BH.sum(dim=0), None, None, None
