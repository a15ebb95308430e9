"""Activations on a CPU whose result for a value does not depend on where it stands.

torch computes sigmoid, SiLU, GELU and softplus in vectors, and the last few values of each thread's share one by one,
which rounds them differently. Exponentials, sums, products and quotients are the same both ways.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.compilation import HEADS
from nextscale.tokenizer import autoencoder

_LANES = 32
"""Values that torch computes at once: two vectors of AVX-512. Other CPUs' are parts of it."""
_FACTOR = 2 * math.sqrt(2 / math.pi)


def compute_gelu(x: Tensor) -> Tensor:
    """tanh-GELU of contiguous rows, by a compiled kernel in their own place.

    Without one, or in 16 bits, as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), in half of torch's time; where
    threads may divide the rows within a vector, as x / (1 + exp(-2u)), which takes 1.3 times as long. One thread and
    two take the same way.
    """
    kernels = build.load_kernels("training", HEADS[-1]) if x.dtype == torch.float32 else None
    if kernels is not None:
        (values,) = build.get_pointers(x)
        kernels.gelu_or_gradient(values, None, values, x.numel(), torch.get_num_threads())
        return x
    whole = all(x.shape[-1] % (_LANES * n) == 0 for n in range(1, max(torch.get_num_threads(), 2) + 1))
    factor = _FACTOR if whole else -_FACTOR
    y = torch.addcmul(x.new_tensor(factor), x, x, value=0.044715 * factor).mul_(x)
    return y.sigmoid_().mul_(x) if whole else torch.div(x, y.exp_().add_(1), out=y)


class CpuSiLU(nn.SiLU):
    """SiLU, in inference one image (or row of the first dimension) at a time, so that threads divide each alike."""

    plain = nn.SiLU

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        return apply_silu(input.clone())


class CpuTokenizerSiLU(autoencoder.SiLU):
    """The tokenizer's, in place."""

    plain = autoencoder.SiLU

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        return apply_silu(input)


def apply_silu(x: Tensor) -> Tensor:
    """SiLU in place, see `CpuSiLU`."""
    for row in x.split(1):
        F.silu(row, inplace=True)
    return x
