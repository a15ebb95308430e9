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
from nextscale.backends.cpu.kernels.blocks import AT_ONCE, can_walk_rows, modulate_rows
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


def normalise_and_modulate(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor | None:
    """`blocks.modulate` with gradients."""
    if not (_trains_rows(x_BND, scale_B1D) and can_walk_rows(x_BND, scale_B1D, shift_B1D)):
        return None
    kernels = build.load_kernels("blocks", HEADS[-1]), build.load_kernels("training", HEADS[-1])
    return None if None in kernels else _Modulation.apply(x_BND, scale_B1D, shift_B1D, eps, kernels)


def add_gated(x_BND: Tensor, y_BND: Tensor, gamma_B1D: Tensor) -> Tensor | None:
    """x + gamma y with gradients."""
    if not (_trains_rows(x_BND, gamma_B1D) and can_walk_rows(y_BND, gamma_B1D) and y_BND.shape == x_BND.shape):
        return None
    kernels = build.load_kernels("training", HEADS[-1])
    return None if kernels is None else _Gated.apply(x_BND, y_BND, gamma_B1D, kernels)


def _trains_rows(x_BND: Tensor, of_images_B1D: Tensor) -> bool:
    """Whether a kernel may give the gradients of these: rows of many tokens, all in float32, of which one is needed."""
    if not torch.is_grad_enabled() or not (x_BND.requires_grad or of_images_B1D.requires_grad):
        return False
    return trains_in_float32(x_BND) and of_images_B1D.dtype == torch.float32


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


_ROWS = 64
"""Rows of an image whose gradients of scale, shift and gamma are added up together."""


def _differentiate_rows(
    kernels: ctypes.CDLL, x_BND: Tensor, dy_BND: Tensor, by_B1D: Tensor, eps: float = -1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and those of what each image has one row of, (B, 2, D), without eps (B, 1, D)."""
    B, N, D = x_BND.shape
    dy_BND = dy_BND.contiguous()
    dx_BND, sums = torch.empty_like(x_BND), x_BND.new_empty(B, -(-N // _ROWS), 1 if eps < 0 else 2, D)
    kernels.gradient_of_rows(
        *build.get_pointers(x_BND, dy_BND), by_B1D.data_ptr(), *build.get_pointers(dx_BND, sums),
        B, N, D, by_B1D.stride(0), _ROWS, eps, torch.get_num_threads(),
    )  # fmt: skip
    return dx_BND, sums.sum(dim=1)


class _Modulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float,
        kernels: tuple[ctypes.CDLL, ctypes.CDLL],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_BND, scale_B1D)
        ctx.eps, ctx.kernels = eps, kernels[1]
        return modulate_rows(kernels[0], x_BND, scale_B1D, shift_B1D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, scale_B1D = ctx.saved_tensors
        dx_BND, sums_B2D = _differentiate_rows(ctx.kernels, x_BND, gradients[0], scale_B1D, ctx.eps)
        return dx_BND, sums_B2D[:, :1], sums_B2D[:, 1:], None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, y_BND: Tensor, gamma_B1D: Tensor, kernels: ctypes.CDLL) -> Tensor:
        ctx.save_for_backward(y_BND, gamma_B1D)
        ctx.kernels = kernels
        return torch.addcmul(x_BND, y_BND, gamma_B1D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y_BND, gamma_B1D = ctx.saved_tensors
        dy_BND, dgamma_B1D = _differentiate_rows(ctx.kernels, y_BND, gradients[0], gamma_B1D)
        return gradients[0], dy_BND, dgamma_B1D, None


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
        scratch = torch.empty(threads * (d + AT_ONCE + 2 * L) * d)
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
        dy_BLD = gradients[0].contiguous()  # a copy must live until the kernel has ended
        B, L, _, H, d = qkv.shape
        dqkv, dlengths_BH, threads = torch.empty_like(qkv), qkv.new_empty(B, H), torch.get_num_threads()
        ends = torch.tensor([0, *(end for _, end in ctx.spans)])
        scratch = torch.empty(threads * (d * 2 * (d + AT_ONCE) + L * d))  # a panel has up to d columns
        pointers = torch.empty(threads * 2 * L, dtype=torch.int64)
        ctx.kernels.attend_gradient(
            *build.get_pointers(qkv, keys, lengths, y_BLD, softmax, dy_BLD, dqkv, dlengths_BH, ends),
            len(ctx.spans), B, H, L, AT_ONCE, int(ctx.normalise), threads, *build.get_pointers(scratch, pointers),
        )  # fmt: skip
        return dqkv, dlengths_BH.sum(dim=0), None, None, None
