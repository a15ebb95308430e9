"""A small encoder of our own, trained without labels, for pictures that DINO does not fit.

config.json          format, version, settings, and for how many steps it was trained
model.safetensors
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.checkpoints.checkpoint import list_shapes
from nextscale.checkpoints.native import read_safetensors, unshare_storage
from nextscale.common.errors import UserError
from nextscale.common.files import has_format, read_json, write_atomically, write_json
from nextscale.config.encoder import EncoderConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.encoders.patches import PatchEncoder

FORMAT, VERSION = "nextscale-encoder", 1
_EPS = 1e-5  # as batch norm's: a channel that is always the same stays near 0
WANTED = "the folder of an encoder that `nextscale encoder train` wrote"


class Convolution(nn.Module):
    """3x3 convolution, group norm, ReLU; added to its input where it keeps the size."""

    def __init__(self, before: int, width: int, groups: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm, self.residual = nn.GroupNorm(groups, width), stride == 1

    def forward(self, x_BChw: Tensor) -> Tensor:
        y_BChw = F.relu(self.norm(self.conv(x_BChw)))
        return x_BChw + y_BChw if self.residual else y_BChw


class SmallEncoder(PatchEncoder):
    """Stages that halve the resolution at their first convolution; the last map holds the patch features, and its mean
    over all places is the image's feature.

    What comes out is standardised by the mean and the deviation of each channel on training images: behind a ReLU no
    value is negative, so any two patches would look alike to a cosine.
    """

    mean_C: Tensor
    deviation_C: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__("untrained", config.patch, config.widths[-1], config.image_size, (0.5,) * 3, (0.5,) * 3)
        self.config, self.steps = config, 0
        layers: list[nn.Module] = []
        for before, width, blocks in zip((3, *config.widths), config.widths, config.blocks, strict=False):
            layers.append(Convolution(before, width, config.groups, stride=2))
            layers += [Convolution(width, width, config.groups) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean_C", torch.zeros(self.width))
        self.register_buffer("deviation_C", torch.ones(self.width))

    def map(self, normal_B3HW: Tensor) -> Tensor:
        """The last map (B, C, h, w) of images in [-1, 1]. Takes gradients: this is what is trained."""
        return self.layers(normal_B3HW.contiguous(memory_format=torch.channels_last))

    def look(self, normal_B3HW: Tensor) -> Tensor:
        return (self.map(normal_B3HW).permute(0, 2, 3, 1) - self.mean_C) / self.deviation_C

    @torch.no_grad()
    def standardise(self, images: Iterable[Tensor]) -> None:
        """Take mean and deviation over all places of these batches of images (B, 3, H, W) in [-1, 1]."""
        count, sums_2C = 0, torch.zeros(2, self.width, dtype=torch.float64, device=self.mean_C.device)
        for image_B3HW in images:
            values_RC = self.map(self.prepared(image_B3HW, self.grid)).movedim(1, -1).flatten(0, 2).double()
            sums_2C += torch.stack([values_RC.sum(dim=0), values_RC.square().sum(dim=0)])
            count += len(values_RC)
        mean_C, square_C = sums_2C / count
        self.mean_C.copy_(mean_C)
        self.deviation_C.copy_(((square_C - mean_C.square()).clamp_min(0) + _EPS).sqrt())

    def trained_for(self, steps: int) -> None:
        """Note how long it was trained: features of another kind than an untrained network's."""
        self.steps, self.kind = steps, "moco_v2" if steps else "untrained"

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        head = {"format": FORMAT, "version": VERSION, "encoder": to_dict(self.config), "steps": self.steps}
        with write_atomically(folder / "model.safetensors", folder / "config.json") as (tensors, config):
            save_file(unshare_storage(dict(self.state_dict())), tensors)
            write_json(config, head)


def is_small_encoder(folder: Path) -> bool:
    """Whether this folder holds an encoder of our own."""
    return has_format(folder, FORMAT)


def load_small_encoder(folder: Path) -> SmallEncoder:
    """The encoder of a folder that `nextscale encoder train` wrote, frozen; UserError when it is none."""
    head = read_json(folder / "config.json")
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UserError(f"{folder} is no encoder of this nextscale: its config.json says another format or version")
    steps = head.get("steps")
    if not isinstance(steps, int) or steps < 0:
        raise UserError(f"{folder}/config.json: steps must be 0 or more, got {steps!r}")
    encoder = SmallEncoder(from_dict(EncoderConfig, head.get("encoder"), f"{folder}/config.json"))
    encoder.load_state_dict(read_safetensors(folder / "model.safetensors", list_shapes(encoder)))
    encoder.trained_for(steps)
    return encoder.eval().requires_grad_(False)
