"""The few tensor operations under every layer, each with one contract.

On a CPU the result for one image must not depend on how many others share its batch, to the last bit. The library
kernels keep that promise but where they switch to another order of summation: matrix products of fewer than 12 rows
(MKL); convolutions of one small image (ATen leaves oneDNN below 20,481 values); and, on one thread, 1x1 convolutions
of fewer than 16 images. `linear` and `Conv2d` keep clear of those thresholds, which costs next to nothing. Measured
bitwise on an AMD EPYC with torch 2.13.0; tests/test_sampling.py holds it for whole images, on one and two threads.

oneDNN's own products (x86) keep the promise but for a single row, and are faster. `linear` takes them in inference, the
faster yet where a weight was packed (`Linear.pack`), and on some CPUs in training, where the promise is not needed, in
float32, forward and backward. NEXTSCALE_PLAIN=1 turns all fast paths off.
"""

from __future__ import annotations

import math
import os
import platform
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError

_MIN_ROWS = 16
_SCORES = 2**23
"""Attention scores that are written out at once in inference."""
_SMALL_CONV = 20480
_LARGE_MAP = 4096
"""Cells of a map from which Winograd's transformations pay."""
_PACKED_FOR = 64
"""Rows that oneDNN lays a packed weight out for: with any number but 0 the layout is good from 2 rows to thousands."""
PACK_ROWS = 32
"""Products of fewer rows, as of the first scales, do not make a weight be packed."""
_PRODUCT_ROWS = 128
"""From here on oneDNN's product is the faster one."""

UNPACKED = "load them with Pipeline.from_pretrained(..., pack=False)"
NO_GRADIENTS = f"these weights are packed for inference and give no gradients; {UNPACKED}"

fast = not os.environ.get("NEXTSCALE_PLAIN")
"""Whether fast paths are taken where there are any; the plain ones compute the same function."""
has_onednn = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

wide_vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Without them (AVX2) GELU is the faster one on its own."""


def _by_intel() -> bool:
    listed = Path("/proc/cpuinfo")
    return "GenuineIntel" in (listed.read_text(encoding="utf-8") if listed.exists() else platform.processor())


trains_by_onednn = has_onednn and wide_vectors and not _by_intel()
"""Whether oneDNN's products are the faster ones in training: not without wide vectors, nor on Intel's own CPUs, where
MKL reaches 155 to 165 GFLOP/s a core and oneDNN 95 to 150 (benchmarks/products.py)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out), then perhaps tanh-GELU: every layer's product."""
    if _by_onednn(x, weight):
        return _inferred(x, weight, bias, gelu)
    rows = x.numel() // x.shape[-1]
    if rows >= _PRODUCT_ROWS and _gains(x) and _trains(x, weight):
        y = _Product.apply(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], weight.shape[0])
    elif x.device.type != "cpu" or rows >= _MIN_ROWS:
        y = F.linear(x.contiguous(), weight, bias)
    else:
        padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, _MIN_ROWS - rows))
        y = F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], weight.shape[0])
    return F.gelu(y, approximate="tanh") if gelu else y


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product of inference that oneDNN computes."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if weight.is_mkldnn:
        if gradient:
            raise UserError(NO_GRADIENTS)
        return True
    if gradient or not fast or x.device.type != "cpu" or x.dtype != weight.dtype or weight.dtype not in _computed():
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def _inferred(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """`linear` by oneDNN. A row's result is the same to the last bit, whatever rows are beside it, packed or not."""
    rows_RI = x.reshape(-1, x.shape[-1]).contiguous()  # the operator leaves other layouts to another library
    rows = len(rows_RI)
    if rows == 1:  # alone it would be summed in another order
        rows_RI = torch.cat((rows_RI, rows_RI))
    fused = gelu and not _gelu_alone(len(weight))
    y = torch.ops.mkldnn._linear_pointwise(
        rows_RI, weight, bias, "gelu" if fused else "none", [], "tanh" if fused else ""
    )[:rows].view(*x.shape[:-1], weight.shape[0])
    return _gelu(y) if gelu and not fused else y


def _gelu_alone(width: int) -> bool:
    """Whether GELU is the faster one outside of the product, and gives a row the same bits wherever it stands.

    torch computes the last few values of each thread's share without vectors, and rounds those differently.
    """
    return not wide_vectors and all(width % (16 * n) == 0 for n in range(1, torch.get_num_threads() + 1))


def _gelu(x: Tensor) -> Tensor:
    """tanh-GELU as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the same function, in half of torch's time."""
    factor = 2 * math.sqrt(2 / math.pi)
    y = torch.addcmul(x.new_tensor(factor), x, x, value=0.044715 * factor)
    return y.mul_(x).sigmoid_().mul_(x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v for queries (B, H, N, d), keys and values (B, H, M, d), where `mask` (N, M) is True.

    In 16 bits on a CPU the scores are written out: there torch's fused kernel takes 1.6 times as long, in training two
    to four times.
    """
    low = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (fast and low and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if torch.is_grad_enabled():
        return _written_out(q, k, v, mask, scale)
    pairs = zip(q.split(2), k.split(2), v.split(2), strict=True)
    return torch.cat([_in_portions(*pair, mask, scale) for pair in pairs])


def _in_portions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `_written_out`, a portion of the queries after another: few enough scores to stay in the cache."""
    at_once = max(_SCORES // (2 * q.shape[1] * k.shape[2]), 32)  # whatever the batch, so that it changes no bit
    portions = q.split(at_once, dim=2)
    masks = [None] * len(portions) if mask is None else mask.split(at_once)
    outs = [_written_out(part, k, v, rows, scale) for part, rows in zip(portions, masks, strict=True)]
    return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores_BHNM = torch.matmul(q * scale if scale != 1 else q, k.transpose(-1, -2))
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores_BHNM.softmax(dim=-1), v)


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Whether this product will be differentiated, in float32."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and weight.dtype == torch.float32


class _Product(torch.autograd.Function):
    """x (R, in) times weight (out, in) transposed, plus bias, forward and backward by oneDNN.

    What is fastest differs: the gradient of x is a 1x1 convolution's, of one image with a pixel for each row and the
    channels last in memory; that of the weight an inner product's. benchmarks/products.py measures them.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight)
        return product(x_RI, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RI, weight = ctx.saved_tensors
        dy_RO = gradients[0].contiguous()
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            input_gradient(dy_RO, weight, x_RI) if dx else None,
            weight_gradient(dy_RO, x_RI, weight) if dweight else None,
            dy_RO.sum(dim=0) if dbias else None,
        )


def full_precision(x: Tensor) -> Any:
    """A context without autocast on x's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def low_precision(x: Tensor) -> torch.dtype | None:
    """The 16-bit type that a layer computes in on x, or None for float32."""
    kind = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x times weight transposed, plus bias, as training computes it; autograd does not look inside."""
    if len(x_RI) < _PRODUCT_ROWS or not _gains(x_RI):
        return F.linear(x_RI, weight_OI, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


def input_gradient(dy_RO: Tensor, weight_OI: Tensor, x_RI: Tensor) -> Tensor:
    """Gradient of x in x times weight transposed: dy times weight, (R, I)."""
    if len(dy_RO) < _PRODUCT_ROWS or not _gains(dy_RO):
        return dy_RO @ weight_OI
    return torch.ops.aten.convolution_backward(
        _pixels(dy_RO), _pixels(x_RI), weight_OI[:, :, None, None], None,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False],
    )[0].permute(0, 2, 3, 1).reshape(x_RI.shape)  # fmt: skip


def weight_gradient(dy_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the weight in x times weight transposed: dy transposed times x, (O, I); written to `out` if given."""
    if len(dy_RO) < _PRODUCT_ROWS or not _gains(dy_RO):
        return torch.mm(dy_RO.T, x_RI, out=out)
    operands = dy_RO.to_mkldnn(), x_RI.to_mkldnn()
    gradient = torch.ops.aten.mkldnn_linear_backward_weights(*operands, weight_OI, False)[0].to_dense()
    return gradient if out is None else out.copy_(gradient)


def _gains(x: Tensor) -> bool:
    """Whether products of training with these rows gain by oneDNN: in float32 on some CPUs."""
    if not (fast and trains_by_onednn) or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 and not torch.compiler.is_compiling()  # the compiler has products of its own


def _pixels(x_RI: Tensor) -> Tensor:
    """Rows (R, I) as one image (1, I, R, 1) whose channels are last in memory."""
    return x_RI.view(1, -1, 1, x_RI.shape[-1]).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """nn.Linear over `linear`, whose weight can be packed: laid out in memory as oneDNN's products read it.

    A packed weight takes the original's place. It is saved, moved and converted like any other, bit for bit, but
    gives no gradients. Packing waits for the first product that gains by it, so that a fresh process starts at once.
    """

    may_pack = False

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return self.product(x, self.bias, gelu)

    def product(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """`linear` by this weight, and by a bias that need not be its own."""
        if self.may_pack and x.numel() >= PACK_ROWS * x.shape[-1]:
            self.pack()
        return linear(x, self.weight, bias, gelu)

    def pack(self) -> None:
        """Pack the weight where that pays: on an x86 CPU, in float32, or in bfloat16 if the CPU computes in it."""
        self.may_pack = False
        if can_pack(self.weight):
            self.weight = nn.Parameter(packed(self.weight), requires_grad=False)

    def train(self, mode: bool = True) -> Linear:
        if mode and (self.may_pack or self.weight.is_mkldnn):
            raise UserError(f"weights that are packed for inference cannot be trained; {UNPACKED}")
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self.weight.to_dense()


def pack(module: nn.Module) -> None:
    """Make every `Linear` of a module, for inference alone, pack its weight at the first product that gains by it."""
    module.requires_grad_(False)
    for part in module.modules():
        if hasattr(part, "may_pack"):
            part.may_pack = True  # type: ignore[assignment]


def can_pack(weight: Tensor) -> bool:
    """Whether a whole weight of a product can be packed, and gains by it: x86, float32, bfloat16 where it is fast."""
    return fast and weight.device.type == "cpu" and weight.dtype in _computed() and not weight.is_mkldnn


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in), for `linear` alone, laid out in memory as oneDNN's products read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR)


class Embedding(nn.Embedding):
    """nn.Embedding that does not draw values on the meta device, where torch would load its compiler for that."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


@lru_cache(maxsize=1)
def has_nnpack() -> bool:
    """Whether this torch has NNPACK and the CPU runs it. (Asking also initialises it, without which calls fail.)"""
    return hasattr(torch, "_nnpack_spatial_convolution") and bool(torch._nnpack_available())


@lru_cache(maxsize=1)
def _computed() -> tuple[torch.dtype, ...]:
    """What oneDNN computes fast on this machine."""
    if not has_onednn:
        return ()
    in_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if in_bfloat16 else (torch.float32,)


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose result for an image is the same alone and in a batch."""

    winograd = False
    """Whether a 3x3 convolution of a large map may go by Winograd's algorithm in inference: about half the time, with
    rounding errors of 1e-5 of the largest value instead of 1e-7. Good for pictures, not for choosing tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if self.kernel_size == (1, 1) and self.stride == (1, 1):
            y = linear(x.flatten(2).transpose(1, 2), self.weight[:, :, 0, 0], self.bias)
            y = y.transpose(1, 2).unflatten(2, x.shape[-2:])
            return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
        if self.winograd and self._large(x):
            one_by_one = [torch._nnpack_spatial_convolution(i, self.weight, self.bias, 1, 1) for i in x.split(1)]
            return one_by_one[0] if len(x) == 1 else torch.cat(one_by_one)
        if x.shape[0] == 1 and x.numel() <= _SMALL_CONV:
            return super().forward(torch.cat((x, x)))[:1]
        return super().forward(x)

    def _large(self, x: Tensor) -> bool:
        """Whether this is a convolution that NNPACK's Winograd computes, and of a map where it is the fastest."""
        same_size = self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)
        inference = not torch.is_grad_enabled() and x.dtype == self.weight.dtype == torch.float32
        return fast and same_size and inference and x.shape[-2] * x.shape[-1] >= _LARGE_MAP and has_nnpack()


def shrink(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Area down-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="area")


def enlarge(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Bicubic up-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="bicubic")
