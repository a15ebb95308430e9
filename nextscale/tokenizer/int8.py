"""3x3 convolutions of the tokenizer's decoder in 8 bits: what `--dtype int8` does to it on a CPU that is fast in them.

Weights are symmetric, one scale for each output channel: w = scale_O q, with q from -127 to 127. Inputs are asymmetric
with one scale and one zero for each image, from its smallest to its largest value and 0, which are found as it comes:
x = scale (u - zero), with u and zero from 0 to 255, so that padding is exact. An image does not depend on its batch.

The first and the last convolution, those of 1x1, attention and norms stay in the decoder's type: they are a small part
of its arithmetic. Weights are kept in floats as they were and rounded for the products alone, so a tokenizer is stored,
compared and digested as before; encoder and quantiser, which choose tokens, are untouched.

Letters: B images, O output channels, I input channels, h w sides of a map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.int8 import LEVELS, NO_GRADIENTS, quantise_weight
from nextscale.tokenizer.autoencoder import Decoder, ResidualBlock, Upsample


@dataclass(frozen=True)
class QuantisedMap:
    """The map of one image in 8 bits: x = scale (u - zero)."""

    u_1Ihw: Tensor
    """uint8, channels last."""
    scale: float
    """More than 0; NaN or infinite for a map that is not finite."""
    zero: int


def find_range(x_1hwI: Tensor) -> tuple[float, int]:
    """Scale and zero of a contiguous map: 0 to `LEVELS` are its smallest to its largest value, 0 being among them."""
    low, high = (float(value) for value in torch.aminmax(x_1hwI))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    return scale, round(-low / scale) if math.isfinite(scale) else 0


def quantise_map(x_1Ihw: Tensor) -> QuantisedMap:
    """The map of one image, of any floating-point type, in integers from 0 to `LEVELS`."""
    x_1hwI = x_1Ihw.permute(0, 2, 3, 1).contiguous()
    scale, zero = find_range(x_1hwI)
    u_1hwI = (x_1hwI.float() * (1 / scale)).round_().add_(zero).clamp_(0, LEVELS).to(torch.uint8)
    return QuantisedMap(u_1hwI.permute(0, 3, 1, 2), scale, zero)


def quantise_kernel(weight_OIhw: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): int8 of the weight's shape and float32 (O,), as `quantise_weight`."""
    q_OK, scale_O = quantise_weight(weight_OIhw.flatten(1))
    return q_OK.view(weight_OIhw.shape), scale_O


class Int8Conv2d(nn.Conv2d):
    """A convolution of stride 1 in 8 bits; its output has its weight's type."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            raise UserError(NO_GRADIENTS)
        images = [self.convolve(self.prepare(image)) for image in input.split(1)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def prepare(self, x_1Ihw: Tensor) -> QuantisedMap:
        """The convolution's input in 8 bits."""
        return quantise_map(x_1Ihw)

    def convolve(self, x: QuantisedMap) -> Tensor:
        """The output (1, O, h, w) of one image. Sums of integers are exact in float64."""
        q, scale_O = quantise_kernel(self.weight)
        sums = F.conv2d(x.u_1Ihw.double() - x.zero, q.double(), None, self.stride, self.padding)
        y = sums * (scale_O.double() * x.scale)[:, None, None]
        return (y if self.bias is None else y + self.bias.detach().double()[:, None, None]).to(self.weight.dtype)


class Int8Upsample(Int8Conv2d, Upsample):
    """Upsample in 8 bits. The smaller map is rounded, which gives the same values."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def prepare(self, x_1Ihw: Tensor) -> QuantisedMap:
        return self.enlarge(quantise_map(x_1Ihw))

    def enlarge(self, small: QuantisedMap) -> QuantisedMap:
        """The map of twice the height and width."""
        return QuantisedMap(F.interpolate(small.u_1Ihw, scale_factor=2, mode="nearest"), small.scale, small.zero)


def quantise_decoder(decoder: Decoder) -> Decoder:
    """Let a decoder's 3x3 convolutions but the first and the last compute in 8 bits, in place; returns it."""
    decoder.int8 = True
    for module in decoder.modules():
        if isinstance(module, ResidualBlock):
            module.conv1, module.conv2 = (_convert(conv, Int8Conv2d) for conv in (module.conv1, module.conv2))
        elif isinstance(resample := getattr(module, "resample", None), Upsample):
            module.resample = _convert(resample, Int8Upsample)
    return decoder


def _convert(conv: nn.Conv2d, kind: type[Int8Conv2d]) -> nn.Conv2d:
    """The same weights and settings in a convolution of this class."""
    if isinstance(conv, Int8Conv2d):
        return conv
    converted = kind.__new__(kind)
    converted.__dict__.update(conv.__dict__)
    return converted
