"""Fast twins of attention and of adaptive layer normalisation.

Letters: B batch, N tokens at hand, L tokens visible, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.blocks import attend, modulate
from nextscale.backends.cpu.kernels.training import add_gated, attend_scales, normalise_and_modulate
from nextscale.backends.cpu.linear import CpuLinear
from nextscale.backends.segments import attend_segments
from nextscale.tokenizer.autoencoder import MapAttention
from nextscale.transformer.attention import Attention, KVCache
from nextscale.transformer.block import AdaLayerNorm, GatedResidual
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.scale_attention import ScaleAttention

_SCORES = 2**23
"""Attention scores that are written out together in inference; they should stay in the cache."""
_ALIGNED = 16
"""Channels, or a multiple, with which every image of a batch begins at a multiple of 64 bytes. Where it does not, a
transposed map of an odd number of cells is rounded by where it lies."""


def compute_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v for queries (B, H, N, d), keys and values (B, H, M, d), where `mask` (N, M) is True.

    In 16 bits the scores are written out: torch's fused kernel takes 1.6 times as long on a CPU, in training two to
    four times.
    """
    low = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (low and q.device.type == "cpu"):
        return _attend_by_image(q, k, v, mask, scale)
    if torch.is_grad_enabled():
        return _write_out(q, k, v, mask, scale)
    pairs = zip(q.split(2), k.split(2), v.split(2), strict=True)
    return torch.cat([_write_out_in_chunks(*pair, mask, scale) for pair in pairs])


def _attend_by_image(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's operator; in inference on several threads of a CPU for one image after the other, as the threads share
    an image's sums where there is little work."""
    together = torch.is_grad_enabled() or torch.get_num_threads() == 1 or len(q) == 1
    if together or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    images = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*image, attn_mask=mask, scale=scale) for image in images])


def _write_out_in_chunks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `_write_out`, one chunk of the queries after another: few enough scores to stay in the cache."""
    size = max(_SCORES // (2 * q.shape[1] * k.shape[2]), 32)  # the same for every batch, so that it changes no bit
    chunks = q.split(size, dim=2)
    masks = [None] * len(chunks) if mask is None else mask.split(size)
    outs = [_write_out(chunk, k, v, rows, scale) for chunk, rows in zip(chunks, masks, strict=True)]
    return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]


def _write_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores_BHNM = torch.matmul(q * scale if scale != 1 else q, k.transpose(-1, -2))
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores_BHNM.softmax(dim=-1), v)


class CpuAttention(Attention):
    """Attention by one compiled kernel where there is one, else in pieces without the masked half."""

    plain = Attention

    def project(self, x_BND: Tensor) -> Tensor:
        qkv = self.qkv
        if isinstance(qkv, CpuLinear):
            return qkv.multiply(x_BND, self.join_biases())
        return super().project(x_BND)

    def mix(self, qkv_BN3Hd: Tensor, context: ScaleContext, state: KVCache | None) -> Tensor:
        if self.rotary is not None:  # the kernels do not rotate
            return super().mix(qkv_BN3Hd, context, state)
        mix = self.mix_scales if context.teacher_forced and state is None else self.mix_by_kernel
        y_BND = mix(qkv_BN3Hd, context, state)
        return y_BND if y_BND is not None else super().mix(qkv_BN3Hd, context, state)

    def mix_scales(self, qkv_BL3Hd: Tensor, context: ScaleContext, state: KVCache | None) -> Tensor | None:
        """As `mix`, for all scales at once and with gradients; None where there is no kernel for it."""
        spans = tuple(context.list_spans(qkv_BL3Hd.shape[1]))
        return attend_scales(qkv_BL3Hd, spans, self.list_lengths(), self.log_scale is not None)

    def list_lengths(self) -> Tensor:
        """What multiplies the queries of each head, (H,)."""
        if self.log_scale is not None:
            return self.query_length().flatten()
        return self.q_bias.new_full((self.heads,), self.softmax_scale)

    def mix_by_kernel(self, qkv_BN3Hd: Tensor, context: ScaleContext, state: KVCache | None) -> Tensor | None:
        """As `mix`, for one scale, in one pass over the values; None where there is no kernel for it."""
        if context.teacher_forced or not build.can_use_kernels(qkv_BN3Hd, self.q_bias):
            return None
        caches, start = ((state.k_BHLd, state.v_BHLd), context.span[0]) if state is not None else (None, 0)
        return attend(qkv_BN3Hd, caches, start, self.list_lengths(), self.log_scale is not None)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return compute_attention(q, k, v, mask, self.softmax_scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ScaleContext) -> Tensor:
        return attend_segments(self.attention, q, k, v, context)


class CpuScaleAttention(CpuAttention, ScaleAttention):
    """Attention within each scale, by the same kernel."""

    plain = ScaleAttention
    attend = ScaleAttention.attend

    def mix_scales(self, qkv_BL3Hd: Tensor, context: ScaleContext, state: KVCache | None) -> None:
        """The kernel's scales attend to those before them, too."""


class CpuMapAttention(MapAttention):
    """The tokenizer's attention over all cells, batch-independent."""

    plain = MapAttention

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] % _ALIGNED:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return _attend_by_image(q, k, v, None, None)


class CpuAdaLayerNorm(AdaLayerNorm):
    """Adaptive layer normalisation in one pass, by a compiled kernel where there is one."""

    plain = AdaLayerNorm

    def forward(self, x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
        y_BND = modulate(x_BND, scale_B1D, shift_B1D, self.eps)
        if y_BND is None:
            y_BND = normalise_and_modulate(x_BND, scale_B1D, shift_B1D, self.eps)
        return y_BND if y_BND is not None else super().forward(x_BND, scale_B1D, shift_B1D)


class CpuGatedResidual(GatedResidual):
    """A branch times gamma added to the residual, whose gradients take one pass by a compiled kernel."""

    plain = GatedResidual

    def forward(self, x_BND: Tensor, y_BND: Tensor, gamma_B1D: Tensor) -> Tensor:
        added_BND = add_gated(x_BND, y_BND, gamma_B1D)
        return added_BND if added_BND is not None else super().forward(x_BND, y_BND, gamma_B1D)
