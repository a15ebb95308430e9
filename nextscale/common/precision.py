"""Which floating-point types are used where: the one place that decides it.

- **Stored and computed type.** Weights are stored in the type that was asked for, and computed in it; except on a CPU
  that is slow in it (`find_computed`), where products are computed in float32. Training always stores float32.
- **auto** takes the fastest type that is right for the device and the model: bfloat16 where its products are faster
  than in float32, else float32. float16 is taken only when it is asked for, as its range is small.
- **int8** (`nextscale.transformer.int8`, `nextscale.tokenizer.int8`) is taken only where it is asked for or a folder
  holds it, as it changes images: on a CPU, for inference.
- **What chooses tokens or experts** (the tokenizer's encoder and quantiser, routers) is computed in full float32,
  whatever autocast and torch's settings for float32 products say: `compute_exactly`. Rounded, it would choose others.
  TF32 alone, which keeps 10 bits, changes about one token in a hundred.
- **The rest of float32** follows torch's settings (`torch.set_float32_matmul_precision`, `torch.backends`): by
  default full float32 in products, and TF32 in convolutions on a GPU, as in the decoder.
- **float64** is used for sums and statistics on devices that have it: `widen`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.dtypes import SHORT_NAMES, parse_dtype
from nextscale.common.errors import UserError

LOW = (torch.bfloat16, torch.float16)
"""The types of 16 bits."""
_FULL = ("none", "ieee")
"""torch's names for float32 products that round nothing."""
_WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of oneDNN's limit on instructions under which it still claims bfloat16."""
_CPU_WIDTH = 768
"""From this width on a transformer is faster in bfloat16 on a CPU with bfloat16 instructions; the elementwise work of
smaller ones takes longer than their products gain."""


def find_dtype(name: torch.dtype | str) -> torch.dtype:
    """The type of this name, floating-point or int8; UserError for anything else, and for auto."""
    dtype = getattr(torch, SHORT_NAMES.get(name, name), None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype == torch.int8):
        raise UserError(f"'{name}' is no floating-point dtype; use auto, float32, bfloat16 or float16, or int8")
    return dtype


def get_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def narrow(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor in the smallest of its own type and of these in which nothing of it is lost."""
    dtype = min((tensor.dtype, *dtypes), key=lambda dtype: dtype.itemsize)
    if dtype.itemsize == tensor.dtype.itemsize:
        return tensor
    small = tensor.to(dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor


# ---- what is fast


def choose_sampling_dtype(name: torch.dtype | str, device: torch.device, width: int) -> torch.dtype:
    """The type of a model's weights. `width`: the transformer's, 0 for a tokenizer alone."""
    if name != "auto":
        return find_dtype(name)
    large = device.type != "cpu" or width >= _CPU_WIDTH
    return torch.bfloat16 if width and large and is_fast(torch.bfloat16, device.type) else torch.float32


def choose_training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of products and convolutions in training, by the name of a setting."""
    name = parse_dtype(name, "precision")
    return find_computed(torch.bfloat16 if name == "auto" else find_dtype(name), device)


def describe_sampling_dtype(name: str, chosen: torch.dtype, device: torch.device, *, fast: bool) -> str:
    """A note where a model is not computed in the type that was asked for, or auto chose one of 16 bits; else empty.

    `fast` as in `find_sampled`.
    """
    if (computed := find_sampled(chosen, device, fast=fast)) != chosen:
        stored, used = get_name(chosen), get_name(computed)
        return f"weights in {stored} are computed in {used}: products in {stored} are slow on this cpu"
    return f"dtype auto: {get_name(chosen)} on {device}" if name == "auto" and chosen in LOW else ""


def find_sampled(chosen: torch.dtype, device: torch.device, *, fast: bool) -> torch.dtype:
    """The type in which a model with weights of type `chosen` is computed in sampling.

    `fast`: whether the model has the fast modules of its device, which alone compute in another type than the weights'.
    """
    return find_computed(chosen, device) if fast and device.type == "cpu" else chosen


def describe_training_dtype(name: str, device: torch.device) -> str:
    """A note where training does not compute in the type of its setting, or chose it; empty otherwise."""
    chosen = get_name(choose_training_dtype(name, device))
    if name == "auto":
        return f"precision auto: {chosen}"
    if name == chosen:
        return ""
    return f"precision {name} is computed in {chosen}, as products in {name} are slow on this {device.type}"


def find_computed(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which a device computes what is of this type: float32 for one of 16 bits in which it is slow."""
    return dtype if is_fast(dtype, device.type) else torch.float32


def is_computed_in_float32(weight: Tensor) -> bool:
    """Whether products with a weight of 16 bits are computed in float32, as `find_computed` says."""
    return weight.dtype in LOW and weight.device.type == "cpu" and not is_fast(weight.dtype, "cpu")


def cast_for(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """x in the type that a layer takes: that of its weight, or float32 where it converts a weight of 16 bits."""
    converts = getattr(layer, "converts_weight", False) and is_computed_in_float32(layer.weight)
    return x.float() if converts else x.to(layer.weight.dtype)


@lru_cache(maxsize=16)
def is_fast(dtype: torch.dtype, kind: str) -> bool:
    """Whether products in `dtype` are faster than in float32 on this kind of device ("cpu", "cuda", "mps").

    Asked of the device and not timed, so that a busy machine answers as an idle one: types decide which image a seed
    gives.
    """
    if dtype == torch.int8:  # also nowhere slower than float32
        return kind == "cpu" and _is_claimed(dtype)
    if dtype not in LOW:
        return True
    if kind == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and _is_claimed(dtype) and _has_instructions(dtype)


def _is_claimed(dtype: torch.dtype) -> bool:
    """Whether oneDNN says that it has products of this type for the CPU. What it denies is emulated slowly."""
    if dtype == torch.int8:
        return is_x86() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    question = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, question, bool)())


def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies in this type, which oneDNN claims: it also claims bfloat16 for an x86 processor
    with AVX-512 and without the instructions for it, where it emulates them."""
    if dtype != torch.bfloat16 or not is_x86():
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in _WITHOUT_BFLOAT16:
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # of older versions of torch


def is_x86() -> bool:
    """Whether the processor is an x86 of 64 bits."""
    return platform.machine() in ("x86_64", "AMD64")


# ---- contexts


def lower_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a type of 16 bits, or no autocast for float32."""
    low = dtype in LOW
    return torch.autocast(device.type, dtype if low else None, enabled=low)


def disable_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on x's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def compute_exactly(x: Tensor) -> AbstractContextManager[object]:
    """A context on x's device without autocast and with full float32 products and convolutions.

    torch's settings hold for the process, so they are put back at the end. Code that torch.compile traces keeps them,
    so compiled training sets them around each forward pass.
    """
    return disable_autocast(x) if x.is_meta or torch.compiler.is_compiling() else _compute_exactly(x)


@contextmanager
def _compute_exactly(x: Tensor) -> Iterator[None]:
    with disable_autocast(x), full_float32(x.device):
        yield


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions of float32 without TF32 or bfloat16 inside."""
    lowered = [(place, place.fp32_precision) for place in _list_settings(device.type)]
    lowered = [(place, value) for place, value in lowered if value not in _FULL]
    for place, _ in lowered:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in lowered:
            place.fp32_precision = value


def _list_settings(kind: str) -> tuple[Any, ...]:
    """Where torch keeps the precision of float32 products and convolutions on this kind of device."""
    backends: Any = torch.backends
    if kind == "cuda":
        return backends.cuda.matmul, backends.cudnn.conv
    return (backends.mkldnn.matmul, backends.mkldnn.conv) if kind == "cpu" else ()


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever dtype its weights and inputs have. Call it without autocast."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias)


# ---- float64


def has_float64(device: torch.device) -> bool:
    """Whether the device has float64; Apple's MPS has not."""
    return device.type != "mps"


def widen(x: Tensor) -> Tensor:
    """x in float64, or in float32 on a device without float64."""
    return x.double() if has_float64(x.device) else x.float()
