"""LPIPS 0.1 with VGG-16 (Zhang et al. 2018, arXiv 1801.03924), from the user's weight files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.checkpoints.checkpoint import check_tensors
from nextscale.checkpoints.official_files import read_tensors
from nextscale.errors import UserError

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distance (B,) of images (B, 3, H, W) in [-1, 1]: differences of normalised VGG features, weighted per channel."""

    shift: Tensor
    scale: Tensor
    stages: list[list[nn.Conv2d]]

    def __init__(self) -> None:
        super().__init__()
        before, stages = 3, nn.ModuleList()
        for widths in _WIDTHS:
            pairs = zip((before, *widths[:-1]), widths, strict=True)
            stages.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs))
            before = widths[-1]
        self.stages = stages  # type: ignore[assignment]
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, widths[-1], 1, 1)) for widths in _WIDTHS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_files(cls, vgg: Path, linear: Path) -> Lpips:
        """Load torchvision's VGG-16 and LPIPS's linear heads; UserError when a file is absent or of another network."""
        model = cls().eval().requires_grad_(False)
        features = {n: t for n, t in read_tensors(vgg, "").items() if n.startswith("features.")}
        expected: dict[str, Tensor] = {}
        for stage, index in zip(model.stages, _torchvision_indices(), strict=True):
            for conv, i in zip(stage, index, strict=True):
                expected |= {f"features.{i}.{name}": tensor for name, tensor in conv.named_parameters()}
        heads = read_tensors(linear, "")
        named = {f"lin{i}.model.1.weight": head for i, head in enumerate(model.heads)}
        for path, found, wanted in ((vgg, features, expected), (linear, heads, named)):
            try:
                check_tensors(path, _shapes(found), _shapes(wanted))
            except UserError as error:
                raise UserError(f"{error}; expected torchvision's VGG-16 and LPIPS 0.1's heads for VGG") from None
            for name, parameter in wanted.items():
                parameter.data.copy_(found[name])
        return model

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        a, b = ((x - self.shift) / self.scale for x in (a_B3HW, b_B3HW))
        distance = a.new_zeros(len(a))
        for i, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if i:
                a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
            for conv in stage:
                a, b = F.relu(conv(a)), F.relu(conv(b))
            difference = (_unit(a) - _unit(b)).square() * head
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(x_BChw: Tensor) -> Tensor:
    return x_BChw / (x_BChw.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _torchvision_indices() -> list[list[int]]:
    """Where torchvision's `features` keep the convolutions: each followed by a ReLU, each stage by a pooling."""
    indices, i = [], 0
    for widths in _WIDTHS:
        indices.append([i + 2 * j for j in range(len(widths))])
        i += 2 * len(widths) + 1
    return indices


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}
