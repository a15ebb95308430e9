"""Fast twins of the decoder's convolutions in 8 bits: oneDNN's convolutions of integers, one image at a time."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.backends.cpu.int8 import find_levels
from nextscale.backends.cpu.kernels.int8 import quantise_image
from nextscale.common.int8 import LEVELS
from nextscale.common.precision import is_fast
from nextscale.tokenizer.autoencoder import Decoder
from nextscale.tokenizer.int8 import Int8Conv2d, Int8Upsample, QuantisedMap, quantise_decoder, quantise_kernel
from nextscale.transformer.int8 import quantise_model

if TYPE_CHECKING:
    from nextscale.tokenizer.tokenizer import Tokenizer
    from nextscale.transformer.var import VAR

_CHANNELS = 128
"""Channels of the largest map from which 8 bits pay: with 32 an image takes as long as in floats, with 160 0.56."""


@lru_cache(maxsize=1)
def is_convolution_fast() -> bool:
    """Whether convolutions of this CPU are faster in 8 bits than in floats: with VNNI.

    Without it oneDNN takes as long as Winograd's algorithm in float32, and its sums of two products overflow.
    """
    known = is_fast(torch.int8, "cpu") and hasattr(torch.ops.onednn, "qconv_pointwise")
    return known and hasattr(torch.ops.onednn, "qconv_prepack") and find_levels() == LEVELS


def quantise_generator(
    transformer: VAR, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """`quantise_model` of the transformer, and `quantise_where_fast` of the tokenizer's decoder."""
    types = quantise_model(transformer, dtype, device)
    quantise_where_fast(tokenizer.decoder)
    return types


def quantise_where_fast(decoder: Decoder) -> None:
    """`quantise_decoder` where this CPU is faster so; elsewhere the decoder stays in floats."""
    if decoder.config.base_channels >= _CHANNELS and is_convolution_fast():
        quantise_decoder(decoder)


class _OneDnn(Int8Conv2d):
    """Rounds its weights at the first image; as floats they stay as they are."""

    packed: tuple[Tensor, Tensor] | None = None

    def pack(self) -> tuple[Tensor, Tensor]:
        """(weight as the convolution reads it, scale (O,))."""
        if self.packed is None:
            q, scale_O = quantise_kernel(self.weight)
            settings = list(self.stride), list(self.padding), list(self.dilation)
            self.packed = torch.ops.onednn.qconv_prepack(q, scale_O, 1.0, 1, *settings, 1, None), scale_O
        return self.packed

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.packed = None
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*arguments, **options)

    def prepare(self, x_1Ihw: Tensor) -> QuantisedMap:
        return quantise_image(x_1Ihw)

    def convolve(self, x: QuantisedMap) -> Tensor:
        if self.weight.device.type != "cpu" or not is_convolution_fast():
            return super().convolve(x)
        weight, scale_O = self.pack()
        scale = x.scale if math.isfinite(x.scale) else math.nan
        settings = list(self.stride), list(self.padding), list(self.dilation), 1
        bias = None if self.bias is None else self.bias.detach().float()
        zeros_O = torch.zeros(self.out_channels, dtype=torch.int32)
        return torch.ops.onednn.qconv_pointwise(
            x.u_1Ihw,
            scale,
            x.zero,
            weight,
            scale_O,
            zeros_O,
            bias,
            *settings,
            1.0,
            0,
            self.weight.dtype,
            "none",
            [],
            "",
        )


class CpuInt8Conv2d(_OneDnn):
    """A convolution in 8 bits by oneDNN."""

    plain = Int8Conv2d


class CpuInt8Upsample(_OneDnn, Int8Upsample):
    """Upsample in 8 bits by oneDNN."""

    plain = Int8Upsample

    def prepare(self, x_1Ihw: Tensor) -> QuantisedMap:
        return self.enlarge(quantise_image(x_1Ihw))
