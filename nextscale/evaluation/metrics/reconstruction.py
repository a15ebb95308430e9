"""PSNR and SSIM of reconstructions, per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.common.checks import check_floats
from nextscale.common.errors import UserError


def _check_pair(a_B3HW: Tensor, b_B3HW: Tensor) -> None:
    for image_B3HW in (a_B3HW, b_B3HW):
        check_floats("a metric of reconstructions", image_B3HW, low=0)
    if a_B3HW.shape != b_B3HW.shape:
        raise UserError(f"images must have equal shapes; got {tuple(a_B3HW.shape)} and {tuple(b_B3HW.shape)}")


def psnr(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair (B,), for images in [0, 1]; 100 dB for equal ones."""
    _check_pair(a_B3HW, b_B3HW)
    error_B = (a_B3HW - b_B3HW).square().flatten(1).mean(dim=1)
    return -10 * error_B.clamp_min(1e-10).log10()


def ssim(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """Structural similarity of each pair (B,), for images in [0, 1] of at least 11 pixels a side.

    Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over channels and over the
    positions where the window lies inside the image.
    """
    _check_pair(a_B3HW, b_B3HW)
    x = torch.arange(11, dtype=a_B3HW.dtype, device=a_B3HW.device) - 5
    g = torch.exp(-x.square() / (2 * 1.5**2))
    window = (g[:, None] * g[None, :] / g.sum() ** 2).expand(3, 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window, groups=3)

    a, b = blur(a_B3HW), blur(b_B3HW)
    var_a, var_b = blur(a_B3HW.square()) - a.square(), blur(b_B3HW.square()) - b.square()
    cov = blur(a_B3HW * b_B3HW) - a * b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * a * b + c1) * (2 * cov + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(dim=1)
