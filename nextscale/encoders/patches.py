"""The base class of image encoders: frozen networks that give one feature vector for each cell of a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.checks import check_floats
from nextscale.common.fingerprint import compute_fingerprint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchEncoder(nn.Module, ABC):
    """Resizes and normalises images, then calls `forward_features`, which subclasses define. Computes no gradients."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(
        self, kind: str, patch: int, width: int, size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD,
    ):  # fmt: skip
        """`kind`: the name of the features. `patch`: pixels per cell of the grid, along each side. `width`: C, the
        channels of a feature. `size`: pixels per side of the images that the encoder was trained on. `mean`, `std`: of
        pixels in 0 to 1."""
        super().__init__()
        self.kind, self.patch, self.width, self.size = kind, patch, width, size
        self.register_buffer("mean_3", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Cells (h, w) of an image of the size that the encoder was trained on."""
        return self.size // self.patch, self.size // self.patch

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, h, w, C), float32, of images in [-1, 1], which are first resized to grid times patch pixels."""
        return self.forward_features(self.preprocess(image_B3HW, grid)).float()

    def preprocess(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images in [-1, 1], resized (bicubic, antialiased) to grid times patch pixels and normalised."""
        check_floats(f"the {self.kind} encoder", image_B3HW)
        size = (grid[0] * self.patch, grid[1] * self.patch)
        image_B3HW = image_B3HW.float()
        if image_B3HW.shape[-2:] != size:
            image_B3HW = F.interpolate(image_B3HW, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((image_B3HW + 1) / 2 - self.mean_3) / self.std_3

    @abstractmethod
    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        """Features (B, h, w, C) of normalised images whose sides are multiples of the patch."""

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return compute_fingerprint(self.state_dict())
