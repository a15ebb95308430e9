"""A small image classifier. Its features measure generators of small images, for which Inception is not suited.

Metrics computed from its features carry its name, so that they are not confused with published ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.checks import check_uint8
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.reading import has_format
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.parse import to_dict
from nextscale.encoders.files import load_frozen, read_head, read_part, save_module
from nextscale.encoders.network import Features
from nextscale.encoders.patches import PatchEncoder

FORMAT, VERSION = "nextscale-classifier", 1


class Stage(nn.Module):
    """Halves the resolution, then adds a residual convolution."""

    def __init__(self, in_width: int, width: int, groups: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BChw = F.gelu(self.norm1(F.max_pool2d(self.conv1(x_BChw), 2)))
        return x_BChw + F.gelu(self.norm2(self.conv2(x_BChw)))


class Classifier(nn.Module):
    """uint8 images to class logits; the features are the input of the last layer, (B, 2 x last width)."""

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
        """Features and logits; with `mirror` in the config, the mean over the image and its mirror image."""
        check_uint8(self.name, image_B3HW)
        pool_BD, logits_BC = self.forward_once(image_B3HW)
        if self.config.mirror:
            mirror_BD, mirror_BC = self.forward_once(image_B3HW.flip(-1))
            pool_BD, logits_BC = (pool_BD + mirror_BD) / 2, (logits_BC + mirror_BC) / 2
        return Features(pool_BD, None, logits_BC)

    def forward_once(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits without the mirror image. Images of another size are resized (bilinear, antialiased)."""
        x_BChw = image_B3HW.float() / 127.5 - 1
        side = (self.config.image_size, self.config.image_size)
        if x_BChw.shape[-2:] != side:
            x_BChw = F.interpolate(x_BChw, side, mode="bilinear", antialias=True)
        x_BChw = self.forward_map(x_BChw)
        pool_BD = torch.cat([x_BChw.mean(dim=(2, 3)), x_BChw.amax(dim=(2, 3))], dim=1)
        return pool_BD.float(), self.head(pool_BD).float()

    def forward_map(self, image_B3HW: Tensor) -> Tensor:
        """The last stage's feature map (B, last width, h, w) of images in [-1, 1]."""
        x_BChw = F.gelu(self.stem(image_B3HW.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x_BChw = stage(x_BChw)
        return x_BChw

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return compute_fingerprint(self.state_dict())

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        head = {"format": FORMAT, "version": VERSION, "classifier": to_dict(self.config)}
        save_module(self, folder, head | {"class_names": list(self.class_names)})


class ClassifierEncoder(PatchEncoder):
    """A classifier's last feature map as patch features, to compare with encoders trained without labels."""

    def __init__(self, model: Classifier):
        config = model.config
        patch = 2 ** len(config.widths)
        super().__init__("classifier", patch, config.widths[-1], config.image_size, (0.5,) * 3, (0.5,) * 3)
        self.model = model.eval().requires_grad_(False)

    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        return self.model.forward_map(image_B3HW).permute(0, 2, 3, 1)


def load_classifier(folder: Path) -> Classifier:
    """The frozen classifier in a folder of `nextscale classifier train`; UserError when the folder holds none."""
    head = read_head(folder, FORMAT, VERSION, "classifier")
    names = head.get("class_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder}/config.json: class_names must be a list of names")
    if len({*names}) < len(names):
        raise UserError(f"{folder}/config.json: class_names must differ from one another")
    config = read_part(ClassifierConfig, head, "classifier", folder)
    return load_frozen(lambda: Classifier(config, tuple(names)), folder, head)


def is_classifier(folder: Path) -> bool:
    """Whether this folder holds a classifier."""
    return has_format(folder, FORMAT)
