"""DINOv2 and DINOv3, loaded with transformers from a local folder or the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.checks import check_uint8
from nextscale.common.errors import UserError
from nextscale.common.extras import import_extra
from nextscale.common.reading import read_json
from nextscale.config.parse import check_fields, read_record
from nextscale.encoders.network import Features
from nextscale.encoders.patches import IMAGENET_MEAN, IMAGENET_STD, PatchEncoder

_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
_SIDE = 224
EXPECTED = "a folder with config.json and model.safetensors of DINOv2 or DINOv3, or such a model's name on the hub"


class Dino(PatchEncoder):
    """The patch tokens of a vision transformer. Image size: the largest multiple of the patch up to 224 pixels."""

    def __init__(self, model: Any, special: int, mean: tuple[float, ...], std: tuple[float, ...]):
        """`special`: number of class and register tokens in front of the patch tokens."""
        patch = int(model.config.patch_size)
        kind, width = str(model.config.model_type), int(model.config.hidden_size)
        super().__init__(kind, patch, width, _SIDE // patch * patch, mean, std)
        self.model, self.special = model.eval().requires_grad_(False), special

    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        grid = [side // self.patch for side in image_B3HW.shape[-2:]]
        return self.model(image_B3HW).last_hidden_state[:, self.special :].unflatten(1, grid)

    @torch.no_grad()
    def forward_class_token(self, image_B3HW: Tensor) -> Tensor:
        """The class token of the last layer (B, C), float32, of images in [-1, 1]."""
        return self.model(self.preprocess(image_B3HW, self.grid)).last_hidden_state[:, 0].float()


class DinoFeatureNetwork(nn.Module):
    """DINO's class token as the feature of an image, from which FD-DINOv2 is computed (Stein et al. 2023)."""

    def __init__(self, encoder: Dino):
        super().__init__()
        self.encoder, self.name = encoder, encoder.kind

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor) -> Features:
        """Features of uint8 images, resized to the largest multiple of the patch up to 224 (bicubic, antialiased)."""
        check_uint8(self.name, image_B3HW)
        return Features(self.encoder.forward_class_token(image_B3HW.float() / 127.5 - 1))

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return self.encoder.fingerprint()


def load_dino(source: str) -> Dino:
    """DINOv2 or DINOv3 from a folder that transformers wrote (config.json, model.safetensors), or from the hub.

    Raises UserError when transformers is missing, when there is no such encoder, or when it is another network.
    """
    transformers = import_extra("transformers", "loading DINOv2 or DINOv3")
    try:
        if (Path(source) / "config.json").is_file():
            read_json(Path(source) / "config.json")  # transformers would take the second of two equal names
        config: Any = transformers.AutoConfig.from_pretrained(source)
        if config.model_type not in _KINDS:
            raise UserError(f"{source} is a '{config.model_type}'; encoders are {', '.join(_KINDS)}")
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # a damaged config raises nearly every type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load an encoder from '{source}' ({reason}); expected {EXPECTED}") from error
    special = 1 + getattr(config, "num_register_tokens", 0)
    return Dino(model, special, *_read_normalisation(Path(source)))


@dataclass(frozen=True)
class _Normalisation:
    """What is used of preprocessor_config.json."""

    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    other: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = {
            "image_mean must be three numbers": len(self.image_mean) == 3,
            "image_std must be three numbers above 0": len(self.image_std) == 3 and min(self.image_std) > 0,
        }
        check_fields("preprocessor", self, rules)


def _read_normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the encoder's preprocessor_config.json, else ImageNet's."""
    path = folder / "preprocessor_config.json"
    settings = read_record(_Normalisation, path) if path.is_file() else _Normalisation()
    return settings.image_mean, settings.image_std
