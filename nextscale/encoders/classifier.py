"""A small image classifier of our own, whose features measure small pictures where Inception's do not fit.

Its figures are named after it, so that nobody takes them for the published ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.checkpoints.checkpoint import list_shapes
from nextscale.checkpoints.native import read_safetensors, unshare_storage
from nextscale.common.errors import UserError
from nextscale.common.files import has_format, read_json, write_atomically, write_json
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.encoders.network import Features, fingerprint
from nextscale.encoders.patches import PatchEncoder

FORMAT, VERSION = "nextscale-classifier", 1


class Stage(nn.Module):
    """Half the resolution, then a residual convolution."""

    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BChw = F.gelu(self.norm1(F.max_pool2d(self.conv1(x_BChw), 2)))
        return x_BChw + F.gelu(self.norm2(self.conv2(x_BChw)))


class Classifier(nn.Module):
    """uint8 images to scores of classes; the features are what the last layer sees, (B, 2 x last width)."""

    name = "classifier"

    def __init__(self, config: ClassifierConfig, class_names: tuple[str, ...]):
        super().__init__()
        self.config, self.class_names = config, class_names
        first, last = config.widths[0] // 2, config.widths[-1]
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        pairs = zip((first, *config.widths[:-1]), config.widths, strict=True)
        self.stages = nn.ModuleList(Stage(a, b, config.groups) for a, b in pairs)
        self.head = nn.Linear(2 * last, len(class_names))

    def forward(self, image_B3HW: Tensor) -> Features:
        """Features and scores, averaged over the mirror image where the config says so."""
        pool_BD, logits_BC = self.look(image_B3HW)
        if self.config.mirror:
            other_BD, other_BC = self.look(image_B3HW.flip(-1))
            pool_BD, logits_BC = (pool_BD + other_BD) / 2, (logits_BC + other_BC) / 2
        return Features(pool_BD, None, logits_BC)

    def look(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Features and scores of the images as they are. Those of another size are resized (bilinear, antialiased)."""
        x_BChw = image_B3HW.float() / 127.5 - 1
        side = (self.config.image_size, self.config.image_size)
        if x_BChw.shape[-2:] != side:
            x_BChw = F.interpolate(x_BChw, side, mode="bilinear", antialias=True)
        x_BChw = self.map(x_BChw)
        pool_BD = torch.cat([x_BChw.mean(dim=(2, 3)), x_BChw.amax(dim=(2, 3))], dim=1)
        return pool_BD.float(), self.head(pool_BD).float()

    def map(self, normal_B3HW: Tensor) -> Tensor:
        """The last stage's map (B, last width, h, w) of images in [-1, 1]."""
        x_BChw = F.gelu(self.stem(normal_B3HW.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x_BChw = stage(x_BChw)
        return x_BChw

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return fingerprint(self)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "classifier": to_dict(self.config),
            "class_names": list(self.class_names),
        }
        with write_atomically(folder / "model.safetensors", folder / "config.json") as (tensors, config):
            save_file(unshare_storage(dict(self.state_dict())), tensors)
            write_json(config, head)


class ClassifierPatches(PatchEncoder):
    """The map of a classifier's last stage as patch features, to compare with what learnt without labels."""

    def __init__(self, model: Classifier):
        config = model.config
        patch = 2 ** len(config.widths)
        super().__init__("classifier", patch, config.widths[-1], config.image_size, (0.5,) * 3, (0.5,) * 3)
        self.model = model.eval().requires_grad_(False)

    def look(self, normal_B3HW: Tensor) -> Tensor:
        return self.model.map(normal_B3HW).permute(0, 2, 3, 1)


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a folder that `nextscale classifier train` wrote; UserError when it is none."""
    head = read_json(folder / "config.json")
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UserError(f"{folder} is no classifier of this nextscale: its config.json says another format or version")
    names = head.get("class_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder}/config.json: class_names must be a list of names")
    config = from_dict(ClassifierConfig, head.get("classifier"), f"{folder}/config.json")
    model = Classifier(config, tuple(names)).eval().requires_grad_(False)
    model.load_state_dict(read_safetensors(folder / "model.safetensors", list_shapes(model)))
    return model


def is_classifier(folder: Path) -> bool:
    """Whether this folder holds a classifier."""
    return has_format(folder, FORMAT)
