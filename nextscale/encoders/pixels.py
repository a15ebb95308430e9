"""The pixels themselves as the features of semantic guidance: a control that knows nothing of what images show."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nextscale.common.fingerprint import compute_fingerprint
from nextscale.encoders.patches import PatchEncoder

NAME = "pixels"
_PATCH = 4


class PixelEncoder(PatchEncoder):
    """The 4x4 pixels of each cell, 48 values in [-1, 1]; the image is resized to 4 pixels a cell first."""

    def __init__(self) -> None:
        super().__init__(NAME, _PATCH, 3 * _PATCH**2, 8 * _PATCH, (0.5,) * 3, (0.5,) * 3)

    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        return F.pixel_unshuffle(image_B3HW, self.patch).permute(0, 2, 3, 1)

    def fingerprint(self) -> str:
        """A checksum of what it computes; it has no weights."""
        return compute_fingerprint({}, f"{NAME} {self.patch}")
