"""A small encoder trained without labels, for images that are too small for DINO.

config.json          format, version, settings, and the number of training steps
model.safetensors
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.precision import widen
from nextscale.common.reading import has_format
from nextscale.config.encoder import EncoderConfig
from nextscale.config.parse import to_dict
from nextscale.encoders.files import load_frozen, read_head, read_part, save_module
from nextscale.encoders.patches import PatchEncoder

FORMAT, VERSION = "nextscale-encoder", 1
_EPS = 1e-5  # as in batch norm: a constant channel stays near 0
EXPECTED = "the folder of an encoder that `nextscale encoder train` wrote"


class Convolution(nn.Module):
    """3x3 convolution, group norm, ReLU; with a residual connection at stride 1."""

    def __init__(self, in_width: int, width: int, groups: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.norm, self.residual = nn.GroupNorm(groups, width), stride == 1

    def forward(self, x_BChw: Tensor) -> Tensor:
        y_BChw = F.relu(self.norm(self.conv(x_BChw)))
        return x_BChw + y_BChw if self.residual else y_BChw


class SmallEncoder(PatchEncoder):
    """Each stage halves the resolution in its first convolution. The last map holds the patch features, and its mean
    over all positions is the feature of the image.

    The output is standardised with the mean and deviation of each channel over training images. Without it all values
    would be positive (the last layer is a ReLU), and any two patches would have a high cosine similarity.
    """

    mean_C: Tensor
    deviation_C: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__("untrained", config.patch, config.widths[-1], config.image_size, (0.5,) * 3, (0.5,) * 3)
        self.config, self.steps = config, 0
        layers: list[nn.Module] = []
        for in_width, width, blocks in zip((3, *config.widths), config.widths, config.blocks, strict=False):
            layers.append(Convolution(in_width, width, config.groups, stride=2))
            layers += [Convolution(width, width, config.groups) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean_C", torch.zeros(self.width))
        self.register_buffer("deviation_C", torch.ones(self.width))

    def forward_map(self, image_B3HW: Tensor) -> Tensor:
        """The last feature map (B, C, h, w) of images in [-1, 1], with gradients, for training."""
        return self.layers(image_B3HW.contiguous(memory_format=torch.channels_last))

    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        return (self.forward_map(image_B3HW).permute(0, 2, 3, 1) - self.mean_C) / self.deviation_C

    @torch.no_grad()
    def compute_statistics(self, images: Iterable[Tensor]) -> None:
        """Set mean and deviation from all positions of these batches of images (B, 3, H, W) in [-1, 1]."""
        count, sums_2C = 0, widen(torch.zeros(2, self.width, device=self.mean_C.device))
        for image_B3HW in images:
            values_RC = widen(self.forward_map(self.preprocess(image_B3HW, self.grid)).movedim(1, -1).flatten(0, 2))
            sums_2C += torch.stack([values_RC.sum(dim=0), values_RC.square().sum(dim=0)])
            count += len(values_RC)
        mean_C, square_C = sums_2C / count
        self.mean_C.copy_(mean_C)
        self.deviation_C.copy_(((square_C - mean_C.square()).clamp_min(0) + _EPS).sqrt())

    def set_steps(self, steps: int) -> None:
        """Set the number of training steps. A trained encoder has another kind of features than an untrained one."""
        self.steps, self.kind = steps, "moco_v2" if steps else "untrained"

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        head = {"format": FORMAT, "version": VERSION, "encoder": to_dict(self.config), "steps": self.steps}
        save_module(self, folder, head)


def is_small_encoder(folder: Path) -> bool:
    """Whether this folder holds an encoder of `nextscale encoder train`."""
    return has_format(folder, FORMAT)


def load_small_encoder(folder: Path) -> SmallEncoder:
    """The frozen encoder in a folder of `nextscale encoder train`; UserError when the folder holds none."""
    head = read_head(folder, FORMAT, VERSION, "encoder")
    steps = head.get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UserError(f"{folder}/config.json: steps must be 0 or more, got {steps!r}")
    config = read_part(EncoderConfig, head, "encoder", folder)
    encoder = load_frozen(lambda: SmallEncoder(config), folder, head)
    encoder.set_steps(steps)
    return encoder
