"""MoCo v3's vision transformers (Chen, Xie, He 2021, arXiv 2104.02057), from the authors' checkpoints.

Modules are named as in the checkpoints, which use timm's names. The position embedding is a fixed 2-D sine-cosine
table stored in the checkpoint, with a row of zeros for the class token; for other grids it is resampled.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.checkpoints import check_floating, check_tensors, list_shapes
from nextscale.checkpoints.official_files import read_tensors
from nextscale.common.errors import UserError
from nextscale.encoders.patches import PatchEncoder

EXPECTED = "MoCo v3's vit-b-300ep.pth.tar (or .pth, .safetensors; of any of its ViTs)"
_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}
_EPS = 1e-6


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, _EPS), _Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, _EPS), _Mlp(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class MocoV3(PatchEncoder):
    """The encoder of a MoCo v3 checkpoint without its head. The features are the patch tokens after the last norm."""

    def __init__(self, width: int, depth: int, patch: int, side: int):
        """`side`: cells per side of the grid that the encoder was trained on."""
        super().__init__("moco_v3", patch, width, side * patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.blocks = nn.ModuleList(_Block(width, _HEADS[width]) for _ in range(depth))
        self.norm = nn.LayerNorm(width, _EPS)

    def forward_features(self, image_B3HW: Tensor) -> Tensor:
        x_BDhw = self.patch_embed["proj"](image_B3HW)
        grid = (x_BDhw.shape[-2], x_BDhw.shape[-1])
        x_BND = torch.cat([self.cls_token.expand(len(x_BDhw), -1, -1), x_BDhw.flatten(2).mT], dim=1)
        x_BND = x_BND + self.position_embedding(grid)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND)[:, 1:].unflatten(1, grid)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding (1, 1 + h w, C) of a grid, resampled as in timm (bicubic, antialiased)."""
        if grid == self.grid:
            return self.pos_embed
        table_1Dhw = self.pos_embed[:, 1:].mT.unflatten(2, self.grid)
        table_1Dhw = F.interpolate(table_1Dhw, grid, mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], table_1Dhw.flatten(2).mT], dim=1)


def load_moco_v3(path: Path) -> MocoV3:
    """The frozen encoder of a MoCo v3 checkpoint (module.base_encoder.*) or of a file with timm's names; ViT-S to H.

    Ignores projection head, momentum encoder and optimizer. Raises UserError when the file is absent, damaged, or of
    another network.
    """
    message = f"{path} holds no encoder of MoCo v3; expected {EXPECTED}"
    try:
        found = read_tensors(path, "pos_embed", prefer="base_encoder")
    except UserError as error:
        raise UserError(f"{error}; expected {EXPECTED}") from error
    tensors = {name: t for name, t in found.items() if name.split(".")[0] != "head"}
    kernel = tensors.get("patch_embed.proj.weight", torch.empty(0))
    if kernel.ndim != 4 or kernel.shape[0] not in _HEADS or tensors["pos_embed"].ndim != 3:
        raise UserError(f"{message}; its patch embedding is {tuple(kernel.shape)}, known widths are {[*_HEADS]}")
    width, patch = kernel.shape[0], kernel.shape[-1]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    side = round(max(0, tensors["pos_embed"].shape[1] - 1) ** 0.5)
    with torch.device("meta"):
        expected = list_shapes(MocoV3(width, depth, patch, side))
    check_tensors(path, {name: tuple(t.shape) for name, t in tensors.items()}, expected)
    check_floating(path, tensors)
    encoder = MocoV3(width, depth, patch, side)
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)
