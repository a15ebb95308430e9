"""Editing without training: in-painting, out-painting, class-conditional editing.

The image is encoded. While sampling, cells that the mask keeps hold the image's tokens at every scale, so the model
generates the rest to fit them (VAR, section 5 of arXiv 2404.02905, and its notebook).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.common.devices import copy_to
from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import DrawTokens, EmbedTokens
from nextscale.tokenizer.tokenizer import Tokenizer

_COARSE = 3


@dataclass(frozen=True)
class Edit:
    """Given tokens at some cells of all scales; the other cells are drawn."""

    tokens_BL: Tensor
    """Tokens of the image that is edited."""
    keep_BL: Tensor
    """bool, True where the image's token stays."""

    def wrap_draw(self, draw: DrawTokens, pyramid: Pyramid) -> DrawTokens:
        """`draw`, with the image's tokens where they stay. All tokens are drawn, so randomness is used as without."""

        def draw_others(logits_BNV: Tensor, k: int) -> Tensor:
            cells = slice(*pyramid.spans[k])
            return torch.where(self.keep_BL[:, cells], self.tokens_BL[:, cells], draw(logits_BNV, k))

        return draw_others

    def wrap_embed(self, embed: EmbedTokens, tokenizer: Tokenizer) -> EmbedTokens:
        """`embed`, with the plain codes of the image's tokens where they stay, in smooth mode too."""

        def embed_others(tokens_BN: Tensor, logits_BNV: Tensor, k: int) -> Tensor:
            cells = slice(*tokenizer.pyramid.spans[k])
            codes_BNC = tokenizer.quantizer.codes(self.tokens_BL[:, cells])
            return torch.where(self.keep_BL[:, cells].unsqueeze(-1), codes_BNC, embed(tokens_BN, logits_BNV, k))

        return embed_others


def build_edit(mask_HW: Tensor, tokens_BL: Tensor, config: ModelConfig) -> Edit:
    """The edit of an image with these tokens; UserError for a mask that is not of the model's size."""
    if mask_HW.shape != config.image_size:
        raise UserError(f"a mask tensor must be {config.image_size}; got {tuple(mask_HW.shape)}")
    return Edit(tokens_BL, copy_to(select_kept_cells(mask_HW, config.pyramid)[None], tokens_BL.device))


def select_kept_cells(mask_HW: Tensor, pyramid: Pyramid) -> Tensor:
    """Which cells of all scales a pixel mask keeps: bool (L,). `mask_HW`: 1 where the image stays, 0 where it goes.

    The mask is resized bilinearly to each map, and a cell stays above one half. Maps of at most three cells always
    stay, as in the official code, because they hold what the image is about. A mask that keeps no cell of the finest
    map keeps nothing at all, which gives a plain sample.
    """
    maps = [_resize(mask_HW, side) > 0.5 for side in pyramid.sides]
    if not maps[-1].any():
        return torch.zeros(pyramid.length, dtype=torch.bool, device=mask_HW.device)
    return torch.cat([(m | (m.numel() <= _COARSE)).flatten() for m in maps])


def _resize(mask_HW: Tensor, side: tuple[int, int]) -> Tensor:
    return F.interpolate(mask_HW.float()[None, None], side, mode="bilinear", align_corners=False)[0, 0]
