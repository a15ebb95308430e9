"""LPIPS 0.1 with VGG-16 or AlexNet (Zhang et al. 2018, arXiv 1801.03924), from the user's weight files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.checkpoints import check_tensors
from nextscale.checkpoints.official_files import read_tensors
from nextscale.common.checks import check_floats, check_range
from nextscale.common.errors import UserError


@dataclass(frozen=True)
class Trunk:
    """The layers of a torchvision network that LPIPS uses: stages, each optionally after a maximum pooling."""

    name: str
    stages: tuple[tuple[tuple[int, int, int, int], ...], ...]
    """Convolutions of each stage: channels, kernel, stride, padding."""
    pooled: tuple[bool, ...]
    """Whether the stage starts with maximum pooling."""
    pool: tuple[int, int]
    """Kernel and stride of the pooling."""

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(stage[-1][0] for stage in self.stages)

    @cached_property
    def smallest_side(self) -> int:
        """The smallest side of an image, in pixels, of which every stage still has a value."""
        return next(side for side in range(1, 1000) if self._count_values(side) > 0)

    def _count_values(self, side: int) -> int:
        """Values along a side of the last stage; 0 or less when a stage has none."""
        for stage, pooled in zip(self.stages, self.pooled, strict=True):
            side = (side - self.pool[0]) // self.pool[1] + 1 if pooled else side
            for _, kernel, stride, padding in stage:
                side = (side + 2 * padding - kernel) // stride + 1 if side > 0 else 0
        return side

    def indices(self) -> list[list[int]]:
        """Indices of the convolutions in torchvision's `features`, by stage; ReLUs and poolings count as modules."""
        indices, i = [], 0
        for stage, pooled in zip(self.stages, self.pooled, strict=True):
            i += pooled
            indices.append([i + 2 * j for j in range(len(stage))])
            i += 2 * len(stage)
        return indices


def _vgg(width: int, convolutions: int) -> tuple[tuple[int, int, int, int], ...]:
    return ((width, 3, 1, 1),) * convolutions


VGG = Trunk(
    "VGG-16",
    (_vgg(64, 2), _vgg(128, 2), _vgg(256, 3), _vgg(512, 3), _vgg(512, 3)),
    (False, True, True, True, True),
    (2, 2),
)
ALEX = Trunk(
    "AlexNet",
    (((64, 11, 4, 2),), ((192, 5, 1, 2),), ((384, 3, 1, 1),), ((256, 3, 1, 1),), ((256, 3, 1, 1),)),
    (False, True, True, False, False),
    (3, 2),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distance (B,) of image pairs (B, 3, H, W) in [-1, 1]: weighted squared differences of normalised features."""

    shift: Tensor
    scale: Tensor
    stages: list[list[nn.Conv2d]]

    def __init__(self, trunk: Trunk = VGG) -> None:
        super().__init__()
        self.trunk = trunk
        in_width, stages = 3, nn.ModuleList()
        for stage in trunk.stages:
            convolutions = nn.ModuleList()
            for width, kernel, stride, padding in stage:
                convolutions.append(nn.Conv2d(in_width, width, kernel, stride, padding))
                in_width = width
            stages.append(convolutions)
        self.stages = stages  # type: ignore[assignment]
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, width, 1, 1)) for width in trunk.widths)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_files(cls, network: Path, linear: Path) -> Lpips:
        """Load torchvision's VGG-16 or AlexNet and LPIPS's linear heads for it.

        Raises UserError when a file is absent or of another network.
        """
        features = {n: t for n, t in read_tensors(network, "features.0.weight").items() if n.startswith("features.")}
        trunk = VGG if f"features.{VGG.indices()[-1][-1]}.weight" in features else ALEX
        model = cls(trunk).eval().requires_grad_(False)
        expected: dict[str, Tensor] = {}
        for stage, index in zip(model.stages, trunk.indices(), strict=True):
            for conv, i in zip(stage, index, strict=True):
                expected |= {f"features.{i}.{name}": tensor for name, tensor in conv.named_parameters()}
        heads = read_tensors(linear, "lin0.model.1.weight")
        expected_heads: dict[str, Tensor] = {f"lin{i}.model.1.weight": head for i, head in enumerate(model.heads)}
        for path, tensors, parameters in ((network, features, expected), (linear, heads, expected_heads)):
            try:
                check_tensors(path, _list_shapes(tensors), _list_shapes(parameters))
            except UserError as error:
                raise UserError(
                    f"{error}; expected torchvision's VGG-16 or AlexNet, and LPIPS 0.1's heads for it (taken for "
                    f"{trunk.name})"
                ) from None
            for name, parameter in parameters.items():
                parameter.data.copy_(tensors[name])
        return model

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """The distance of each pair (B,) of images of equal shape (B, 3, H, W) in [-1, 1]. UserError for others; only
        the range is not checked where gradients are computed."""
        for image_B3HW in (a_B3HW, b_B3HW):
            check_floats("LPIPS", image_B3HW)
            if not torch.is_grad_enabled():  # in training, reconstructions may exceed the range
                check_range("LPIPS", image_B3HW)
        if min(a_B3HW.shape[2:]) < self.trunk.smallest_side:
            raise UserError(
                f"LPIPS with {self.trunk.name} needs images of {self.trunk.smallest_side} pixels a side or more; got "
                f"{a_B3HW.shape[2]} x {a_B3HW.shape[3]}"
            )
        if a_B3HW.shape != b_B3HW.shape:
            raise UserError(f"LPIPS compares images of equal shape; got {tuple(a_B3HW.shape)}, {tuple(b_B3HW.shape)}")
        a, b = ((x - self.shift) / self.scale for x in (a_B3HW, b_B3HW))
        distance = a.new_zeros(len(a))
        for i, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if self.trunk.pooled[i]:
                a, b = F.max_pool2d(a, *self.trunk.pool), F.max_pool2d(b, *self.trunk.pool)
            for conv in stage:
                a, b = F.relu(conv(a)), F.relu(conv(b))
            difference = (_normalise(a) - _normalise(b)).square() * head
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance


def _normalise(x_BChw: Tensor) -> Tensor:
    return x_BChw / (x_BChw.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _list_shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}
