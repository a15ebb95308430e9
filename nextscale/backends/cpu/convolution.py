"""Fast twins of the tokenizer's convolutions, decoder and quantiser.

An image's result does not depend on the images beside it (see `nextscale.backends.optimize`). ATen computes the
convolution of one small image (up to 20,480 values) by another library than that of a batch, and, on one thread, 1x1
convolutions of fewer than 16 images in another order; both cases are avoided here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.products import linear
from nextscale.common.precision import is_computed_in_float32
from nextscale.tokenizer.autoencoder import Decoder, Downsample, Upsample
from nextscale.tokenizer.quantizer import Phi, Quantizer

_SMALL_IMAGE = 20480
"""Values of one image up to which ATen would use another library."""
_LARGE_MAP = 4096
"""Cells of a map from which Winograd's transformations pay."""
_DECODED_VALUES = 2**23
"""Values of the decoder's largest map over all images that are decoded together; more would not fit the caches."""


@lru_cache(maxsize=1)
def has_nnpack() -> bool:
    """Whether this torch has NNPACK and the CPU runs it. (Asking also initialises it, without which calls fail.)"""
    return hasattr(torch, "_nnpack_spatial_convolution") and bool(torch._nnpack_available())


class BatchIndependentConvolution(nn.Conv2d):
    """Overrides how nn.Conv2d and its subclasses compute; their own forward stays."""

    converts_weight = True

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        input, weight, bias = _convert(input, weight, bias)
        if self.kernel_size == (1, 1) and self.stride == (1, 1):
            y = linear(input.flatten(2).transpose(1, 2), weight[:, :, 0, 0], bias)
            y = y.transpose(1, 2).unflatten(2, input.shape[-2:])
            return y if input.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
        if input.shape[0] == 1 and input.numel() <= _SMALL_IMAGE:
            return super()._conv_forward(torch.cat((input, input)), weight, bias)[:1]
        return super()._conv_forward(input, weight, bias)


def _convert(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A convolution's arguments, in float32 where a weight of 16 bits is computed in float32."""
    if not is_computed_in_float32(weight):
        return input, weight, bias
    return input.float(), weight.float(), None if bias is None else bias.float()


class CpuConv2d(BatchIndependentConvolution):
    """nn.Conv2d whose result for an image is the same alone and in a batch."""

    plain = nn.Conv2d


class CpuDownsample(BatchIndependentConvolution, Downsample):
    """Downsample, batch-independent."""

    plain = Downsample


class CpuPhi(BatchIndependentConvolution, Phi):
    """Phi, batch-independent."""

    plain = Phi


class _Winograd(BatchIndependentConvolution):
    """3x3 convolutions of large maps by Winograd's algorithm in inference: about half the time.

    Rounding errors are 1e-5 of the largest value instead of 1e-7: good for decoding images, not for choosing tokens.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, weight, bias = _convert(input, weight, bias)
        if not self.uses_winograd(input):
            return super()._conv_forward(input, weight, bias)
        images = [torch._nnpack_spatial_convolution(image, weight, bias, 1, 1) for image in input.split(1)]
        return images[0] if len(input) == 1 else torch.cat(images)

    def uses_winograd(self, x: Tensor) -> bool:
        """Whether NNPACK can compute this convolution and the map is large enough for it to be faster."""
        same_size = self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)
        full = x.dtype == torch.float32 and (self.weight.dtype == x.dtype or is_computed_in_float32(self.weight))
        inference = not torch.is_grad_enabled() and full
        large = x.shape[-2] * x.shape[-1] >= _LARGE_MAP
        return x.device.type == "cpu" and same_size and inference and large and has_nnpack()


class WinogradConv2d(_Winograd):
    """nn.Conv2d of a decoder."""

    plain = nn.Conv2d


class WinogradUpsample(_Winograd, Upsample):
    """Upsample of a decoder."""

    plain = Upsample


class CpuDecoder(Decoder):
    """The decoder, in inference a few images at a time."""

    plain = Decoder

    def forward(self, features_BChw: Tensor) -> Tensor:
        if torch.is_grad_enabled() or features_BChw.device.type != "cpu":
            return super().forward(features_BChw)
        height, width = (side * self.config.downsampling for side in features_BChw.shape[-2:])
        images = 1 if self.int8 else max(_DECODED_VALUES // (height * width * self.config.base_channels), 1)
        return torch.cat([super(CpuDecoder, self).forward(part) for part in features_BChw.split(images)])


class CpuQuantizer(Quantizer):
    """The quantiser with batch-independent products."""

    plain = Quantizer

    def compare(self, z_RC: Tensor, codebook_VC: Tensor) -> Tensor:
        return linear(z_RC, codebook_VC)

    def mix_codes(self, probability_BNV: Tensor) -> Tensor:
        return linear(probability_BNV, self.codebook.weight.T)


def use_channels_last(convolution: nn.Conv2d) -> None:
    """Lay a weight out as convolutions in bfloat16 read it fastest on a CPU; its values stay."""
    weight = convolution.weight
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not is_computed_in_float32(weight):
        convolution.weight.data = convolution.weight.data.to(memory_format=torch.channels_last)
