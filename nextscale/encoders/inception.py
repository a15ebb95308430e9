"""The Inception-v3 of published FIDs: the 2015 TensorFlow graph, from weight files ported to PyTorch.

It differs from torchvision's: average pooling excludes the padding, the last block uses maximum pooling, the classifier
has 1,008 classes, and images are resized as in TensorFlow 1. Modules are named as in the weight files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.checkpoints import check_tensors
from nextscale.checkpoints.official_files import read_tensors
from nextscale.common.checks import check_uint8
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.encoders.network import Features

FILE = "pt_inception-2015-12-05-6726825d.pth (or torch-fidelity's weights-inception-2015-12-05-6726825d.pth)"
_SIDE, _SPATIAL = 299, 7
_FIRST = "Conv2d_1a_3x3.conv.weight"

Unit = tuple[int, tuple[int, int], int]
"""Channels, kernel (h, w), stride of a convolution."""
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU. At stride 1 the padding keeps the size; stride 2 has no padding."""

    def __init__(self, in_width: int, width: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_width, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BChw)))


class Mixed(nn.Module):
    """Parallel branches whose channels are concatenated. A branch is a chain of units and may fork at its end.

    A unit is named after its branch; in a branch of several, units are numbered from 1, and those of a fork are named a
    and b. The pooled input goes into the branch `branch_pool`; without such a branch it is concatenated last.
    """

    def __init__(self, in_width: int, pool: Callable[[Tensor], Tensor], **branches: list[Unit | tuple[Unit, Unit]]):
        super().__init__()
        self.pool, self.chains = pool, []
        self.width = 0 if "branch_pool" in branches else in_width
        for branch, specs in branches.items():
            chain: list[tuple[str, ...]] = []
            channels = in_width
            for i, spec in enumerate(specs, start=1):
                units = spec if isinstance(spec[0], tuple) else (spec,)
                stem = branch if len(specs) == 1 else f"{branch}_{i}"
                names = (stem,) if len(units) == 1 else (f"{stem}a", f"{stem}b")
                for name, unit in zip(names, units, strict=True):
                    self.add_module(name, ConvUnit(channels, *unit))
                channels = sum(unit[0] for unit in units)
                chain.append(names)
            self.chains.append((branch, chain))
            self.width += channels

    def forward(self, x_BChw: Tensor) -> Tensor:
        outputs = []
        for branch, chain in self.chains:
            y = self.pool(x_BChw) if branch == "branch_pool" else x_BChw
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.chains[-1][0] != "branch_pool":
            outputs.append(self.pool(x_BChw))
        return torch.cat(outputs, dim=1)


def _unit(width: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Unit:
    return width, (kernel, kernel) if isinstance(kernel, int) else kernel, stride


def _mixed_5(in_width: int, pool_width: int) -> Mixed:
    return Mixed(
        in_width,
        _average,
        branch1x1=[_unit(64)],
        branch5x5=[_unit(48), _unit(64, 5)],
        branch3x3dbl=[_unit(64), _unit(96, 3), _unit(96, 3)],
        branch_pool=[_unit(pool_width)],
    )


def _mixed_6(middle: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    return Mixed(
        768,
        _average,
        branch1x1=[_unit(192)],
        branch7x7=[_unit(middle), _unit(middle, wide), _unit(192, tall)],
        branch7x7dbl=[_unit(middle), _unit(middle, tall), _unit(middle, wide), _unit(middle, tall), _unit(192, wide)],
        branch_pool=[_unit(192)],
    )


def _mixed_7(in_width: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    fork = (_unit(384, (1, 3)), _unit(384, (3, 1)))
    return Mixed(
        in_width,
        pool,
        branch1x1=[_unit(320)],
        branch3x3=[_unit(384), fork],
        branch3x3dbl=[_unit(448), _unit(384, 3), fork],
        branch_pool=[_unit(192)],
    )


class Inception(nn.Module):
    """uint8 images to pool features (B, 2048), spatial features (B, 2023) and class logits (B, 1008)."""

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288, _halve, branch3x3=[_unit(384, 3, 2)], branch3x3dbl=[_unit(64), _unit(96, 3), _unit(96, 3, 2)]
        )
        self.Mixed_6b, self.Mixed_6c = _mixed_6(128), _mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(160), _mixed_6(192)
        self.Mixed_7a = Mixed(
            768,
            _halve,
            branch3x3=[_unit(192), _unit(320, 3, 2)],
            branch7x7x3=[_unit(192), _unit(192, (1, 7)), _unit(192, (7, 1)), _unit(192, 3, 2)],
        )
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, _average), _mixed_7(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_file(cls, path: Path) -> Inception:
        """Load the ported weights; UserError when the file is absent or of another network."""
        if not path.exists():
            raise UserError(f"there is no {path}; Inception features need {FILE}")
        try:
            tensors = {n: t for n, t in read_tensors(path, _FIRST).items() if not n.endswith("num_batches_tracked")}
            model = cls().eval().requires_grad_(False)
            expected = {n: t.shape for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
            check_tensors(path, {n: tuple(t.shape) for n, t in tensors.items()}, expected)
        except UserError as error:
            raise UserError(f"{error}; expected {FILE}") from None
        model.load_state_dict(tensors, strict=False)
        return model

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor) -> Features:
        """`spatial`: the first 7 channels of the 1x1 branch of Mixed_6d, in the order (h, w, channel), as in ADM's
        evaluator. `logits`: without the bias, as in ADM's Inception Score."""
        check_uint8(self.name, image_B3HW)
        x = (resize_like_tensorflow(image_B3HW.float(), _SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial_B7hw = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :_SPATIAL]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool_BD = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return Features(pool_BD, spatial_B7hw.permute(0, 2, 3, 1).flatten(1), pool_BD @ self.fc.weight.T)

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return compute_fingerprint(self.state_dict())


def resize_like_tensorflow(image_B3HW: Tensor, side: int) -> Tensor:
    """Bilinear resize without antialiasing, as in TensorFlow 1: target pixel i is sampled at i times the size ratio."""
    for dim in (2, 3):
        size = image_B3HW.shape[dim]
        position = torch.arange(side, dtype=torch.float32, device=image_B3HW.device) * (size / side)
        low = position.floor().long().clamp_max(size - 1)
        high = (low + 1).clamp_max(size - 1)
        weight = (position - low).view(-1, 1) if dim == 2 else position - low
        first, second = image_B3HW.index_select(dim, low), image_B3HW.index_select(dim, high)
        image_B3HW = first + (second - first) * weight
    return image_B3HW
