"""Self-supervised encoders, frozen: DINOv2 and DINOv3 from a local folder or the Hugging Face hub, by transformers.

Each has its own patch size, normalisation and special tokens; here they all turn images in [-1, 1] into one feature
vector per cell of a grid.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import UserError
from nextscale.files import read_json

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


class PatchEncoder(nn.Module):
    """A vision transformer without its special tokens. Takes no gradient."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, model: nn.Module, patch: int, special: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model, self.patch, self.special = model.eval().requires_grad_(False), patch, special
        self.register_buffer("mean_3", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, h, w, C), float32, of images in [-1, 1], which are first resized to grid times patch pixels."""
        h, w = grid
        size = (h * self.patch, w * self.patch)
        image_B3HW = F.interpolate(image_B3HW.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        normal_B3HW = ((image_B3HW + 1) / 2 - self.mean_3) / self.std_3
        features_BNC = self.model(normal_B3HW).last_hidden_state[:, self.special :].float()
        return features_BNC.unflatten(1, (h, w))

    def fingerprint(self) -> str:
        """A checksum of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


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
    return PatchEncoder(model, config.patch_size, special, *_normalisation(Path(source)))


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the encoder's preprocessor_config.json, else ImageNet's."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    return tuple(settings.get("image_mean", _IMAGENET_MEAN)), tuple(settings.get("image_std", _IMAGENET_STD))
