"""The patch discriminator of VQGAN, with hinge loss and adaptive weight (Esser et al. 2021, arXiv 2012.09841)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError


class PatchDiscriminator(nn.Module):
    """Convolutions that classify overlapping patches: image (B, 3, H, W) in [-1, 1] to one logit per patch.

    GroupNorm stands where pix2pix has BatchNorm, so that the result for an image does not depend on its batch.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            blocks += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(1, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.last_bias = f"layers.{len(blocks)}.bias"

    @staticmethod
    def check_size(size: tuple[int, int], layers: int) -> None:
        """Raise UserError when images of this (height, width) are smaller than a patch."""
        least = 3 * 2**layers
        if min(size) < least:
            raise UserError(
                f"losses: a discriminator of {layers} layers needs images of {least} pixels a side or more, and these "
                f"are {size[0]} x {size[1]}: lower discriminator_layers, or set adversarial to 0"
            )

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.layers(image_B3HW)


def compute_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real patches above 1, reconstructed ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def compute_adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer: both then have equal influence."""
    (target,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (target.norm() / (gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
