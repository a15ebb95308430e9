"""Two random views of an image, by crops and colour changes, for a batch at once.

A view follows from its random `draws` alone, so it does not depend on the other images of the batch. Colours are
changed by one affine map of RGB for each view, composed as in StyleGAN2-ADA (Karras et al. 2020, arXiv
2006.06676): brightness, contrast, saturation, hue, in this order.

Letters: B batch, C and D colours.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.config.encoder import ViewConfig

DRAWS = 11
"""Random numbers in 0 to 1 of a view: area, aspect, row, column, flip, whether colours change, brightness, contrast,
saturation, hue, grey."""
_ASPECT = math.log(4 / 3)
_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def make_view(image_B3HW: Tensor, draws_BU: Tensor, config: ViewConfig) -> Tensor:
    """One view of each uint8 image: float32 (B, 3, H, W) in [-1, 1]. `draws_BU`: (B, DRAWS) in 0 to 1."""
    image_B3HW = crop_images(image_B3HW.float() / 255, draws_BU[:, :5], config)
    return change_colours(image_B3HW, draws_BU[:, 5:], config) * 2 - 1


def crop_images(image_B3HW: Tensor, draws_B5: Tensor, config: ViewConfig) -> Tensor:
    """A crop of each image resized to the image's size (bilinear), mirrored or not; a side is at most the image's."""
    area_B, aspect_B, row_B, column_B, flip_B = draws_B5.unbind(1)
    area_B = config.smallest_crop + (1 - config.smallest_crop) * area_B
    half_B = _ASPECT * (aspect_B - 0.5)  # of the logarithm of width / height
    height_B, width_B = (area_B.sqrt() * (half_B * sign).exp() for sign in (-1, 1))
    height_B, width_B = height_B.clamp(max=1), width_B.clamp(max=1)
    sign_B = torch.where((flip_B < 0.5) & config.flip, -1.0, 1.0)
    zero_B = torch.zeros_like(area_B)
    # positions in the image are -1 to 1
    across = torch.stack([sign_B * width_B, zero_B, (1 - width_B) * (2 * column_B - 1)], dim=1)
    down = torch.stack([zero_B, height_B, (1 - height_B) * (2 * row_B - 1)], dim=1)
    positions = F.affine_grid(torch.stack([across, down], dim=1), list(image_B3HW.shape), align_corners=False)
    return F.grid_sample(image_B3HW, positions, padding_mode="border", align_corners=False)


def change_colours(image_B3HW: Tensor, draws_B6: Tensor, config: ViewConfig) -> Tensor:
    """Images in 0 to 1 with other brightness, contrast, saturation and hue, or in grey; again in 0 to 1."""
    change_B, *factors, hue_B, grey_B = draws_B6.unbind(1)
    is_changed_B = change_B < config.jitter_share
    strengths = (torch.where(is_changed_B, 1 + config.jitter * (2 * u - 1), 1.0) for u in factors)
    brightness_B, contrast_B, saturation_B = strengths
    angle_B = torch.where(is_changed_B, 2 * math.pi * config.hue * (2 * hue_B - 1), 0.0)
    luma_C, yiq_CD, inverse_CD = _create_constants(image_B3HW.device, image_B3HW.dtype)
    mean_B = brightness_B * torch.einsum("bchw,c->b", image_B3HW, luma_C) / image_B3HW[0, 0].numel()
    colour_BCD = _build_hue_rotation(angle_B, yiq_CD, inverse_CD) @ _build_saturation(saturation_B, luma_C)
    colour_BCD = torch.where((grey_B < config.grey_share)[:, None, None], luma_C.expand(3, 3), colour_BCD)
    colour_BCD = colour_BCD * (brightness_B * contrast_B)[:, None, None]
    offset_B = (1 - contrast_B) * mean_B  # grey, which saturation and hue do not change
    flat_BDn = image_B3HW.flatten(2)
    return torch.baddbmm(offset_B[:, None, None], colour_BCD, flat_BDn).clamp(0, 1).view_as(image_B3HW)


@lru_cache(maxsize=8)
def _create_constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of grey (3,), and the maps from RGB to YIQ and back (3, 3). Copied to the device once."""
    yiq = torch.tensor(_YIQ, dtype=dtype)
    return torch.tensor(_LUMA, dtype=dtype).to(device), yiq.to(device), torch.linalg.inv(yiq).to(device)


def _build_saturation(strength_B: Tensor, luma_C: Tensor) -> Tensor:
    """Maps (B, 3, 3) of colours that scale the distance from their grey."""
    strength_B11 = strength_B[:, None, None]
    return strength_B11 * torch.eye(3, device=luma_C.device) + (1 - strength_B11) * luma_C.expand(3, 3)


def _build_hue_rotation(angle_B: Tensor, yiq_CD: Tensor, inverse_CD: Tensor) -> Tensor:
    """Maps (B, 3, 3) of colours that rotate about the grey axis: a rotation of YIQ's I and Q."""
    cosine_B, sine_B = angle_B.cos(), angle_B.sin()
    one_B, zero_B = torch.ones_like(angle_B), torch.zeros_like(angle_B)
    rows = [(one_B, zero_B, zero_B), (zero_B, cosine_B, -sine_B), (zero_B, sine_B, cosine_B)]
    turn_B33 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return inverse_CD @ turn_B33 @ yiq_CD
