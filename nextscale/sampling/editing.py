"""Editing without training: in-painting, out-painting, class-conditional editing.

The image is encoded; while sampling, cells that the mask keeps hold the image's tokens at every scale, so the model
fills the rest to fit them (VAR, section 5 of arXiv 2404.02905, and its notebook).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.pyramid import Pyramid

_COARSE = 3


def keep_cells(mask_HW: Tensor, pyramid: Pyramid) -> Tensor:
    """Which cells of all scales a pixel mask keeps: bool (L,). `mask_HW`: 1 where the image stays, 0 where it goes.

    The mask is resized bilinearly to each map, and a cell stays above one half. Maps of at most three cells stay
    whole, as in the official code, since they hold what the image is about; a mask that keeps no cell of the finest
    map keeps nothing at all, so that it leaves a plain sample.
    """
    maps = [_resized(mask_HW, side) > 0.5 for side in pyramid.sides]
    if not maps[-1].any():
        return torch.zeros(pyramid.length, dtype=torch.bool, device=mask_HW.device)
    return torch.cat([(m | (m.numel() <= _COARSE)).flatten() for m in maps])


def _resized(mask_HW: Tensor, side: tuple[int, int]) -> Tensor:
    return F.interpolate(mask_HW.float()[None, None], side, mode="bilinear", align_corners=False)[0, 0]
