"""Self-supervised encoders, frozen: DINOv2 and DINOv3 from a local folder or the Hugging Face hub, by transformers.

Each has its own patch size, normalisation and special tokens; here they all turn images in [-1, 1] into one feature
vector per cell of a grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import UserError
from nextscale.features.network import Features, fingerprint
from nextscale.files import read_json

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


class PatchEncoder(nn.Module):
    """A vision transformer without its special tokens. Takes no gradient."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, model: Any, special: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model, self.special = model.eval().requires_grad_(False), special
        self.patch, self.kind = int(model.config.patch_size), str(model.config.model_type)
        self.register_buffer("mean_3", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, h, w, C), float32, of images in [-1, 1], which are first resized to grid times patch pixels."""
        return self.tokens(image_B3HW, grid)[:, self.special :].unflatten(1, grid)

    @torch.no_grad()
    def tokens(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """All tokens of the last layer (B, special + h w, C), float32; the class token comes first."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        image_B3HW = F.interpolate(image_B3HW.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        normal_B3HW = ((image_B3HW + 1) / 2 - self.mean_3) / self.std_3
        return self.model(normal_B3HW).last_hidden_state.float()

    @property
    def width(self) -> int:
        """Width C of a feature."""
        return int(self.model.config.hidden_size)

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return fingerprint(self)


class ClassToken(nn.Module):
    """An encoder's class token as the feature of a whole image: what FD-DINOv2 is made of (Stein et al. 2023)."""

    def __init__(self, encoder: PatchEncoder, side: int = 224):
        super().__init__()
        self.encoder, self.grid, self.name = encoder, side // encoder.patch, encoder.kind

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor) -> Features:
        """Of uint8 images, resized to the largest multiple of the patch within 224 pixels (bicubic, antialiased)."""
        image_B3HW = image_B3HW.float() / 127.5 - 1
        return Features(self.encoder.tokens(image_B3HW, (self.grid, self.grid))[:, 0])

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        return self.encoder.fingerprint()


def load_encoder(source: str) -> PatchEncoder:
    """DINOv2 or DINOv3 from a folder with config.json and model.safetensors (as transformers writes it), or a hub name.

    Raises UserError when transformers is missing, when there is no such encoder, or when it is of another kind.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise UserError("encoders are read by transformers: pip install 'nextscale[features]'") from None
    try:
        config: Any = AutoConfig.from_pretrained(source)
        if config.model_type not in _KINDS:
            raise UserError(f"{source} is a '{config.model_type}'; encoders are {', '.join(_KINDS)}")
        model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load an encoder from '{source}' ({reason}); it wants a folder with config.json and "
            "model.safetensors of DINOv2 or DINOv3, or such a model's name on the hub"
        ) from error
    special = 1 + getattr(config, "num_register_tokens", 0)
    return PatchEncoder(model, special, *_normalisation(Path(source)))


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the encoder's preprocessor_config.json, else ImageNet's."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    return tuple(settings.get("image_mean", _IMAGENET_MEAN)), tuple(settings.get("image_std", _IMAGENET_STD))
