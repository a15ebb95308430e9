"""Residual quantisation over the scales: from token maps to a canvas and back.

Encoding, teacher forcing, decoding, sampling and training all call the same two functions: `upsample_codes` computes
what one token map adds to the canvas, `next_input` what the next scale sees of it.

Letters: B batch, N tokens of one scale, L of all scales, K scales, V codes, c code width (C in suffixes), h w the
canvas side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.devices import create_embedding
from nextscale.common.precision import compute_exactly
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.pyramid import Pyramid


class Phi(nn.Conv2d):
    """phi(h) = (1 - r) h + r conv3x3(h): repairs what up-sampling blurs."""

    def __init__(self, width: int, ratio: float):
        super().__init__(width, width, 3, padding=1)
        self.ratio = ratio

    def forward(self, h_BChw: Tensor) -> Tensor:
        return h_BChw * (1 - self.ratio) + super().forward(h_BChw) * self.ratio


@dataclass(frozen=True)
class EncodedScale:
    """One scale of an encoding."""

    tokens_BN: Tensor
    residual_BNC: Tensor
    """The residual at this side: the vectors that were looked up in the codebook."""
    canvas_BChw: Tensor
    """The canvas with this scale on it."""


@dataclass(frozen=True)
class Quantized:
    """One pass of the quantiser in training."""

    features_BChw: Tensor
    """The canvas in value, the encoder's features in gradient (straight-through): what is decoded."""
    loss: Tensor
    """Codebook and commitment loss, mean over the scales."""
    tokens_BL: Tensor
    residual_BLC: Tensor
    """The vectors that were looked up in the codebook, without gradient."""


class Quantizer(nn.Module):
    """Codebook, phi convolutions and the residual loop over scales. Always computes in float32."""

    usage_KV: Tensor

    def __init__(self, config: TokenizerConfig, pyramid: Pyramid):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        self.codebook = create_embedding(config.vocab_size, config.code_width)
        # As small as the features of a fresh encoder: codes drawn far outside them are never chosen, so never learn.
        if not self.codebook.weight.is_meta:
            nn.init.normal_(self.codebook.weight, std=0.1)
        num_phi = config.num_phi if config.phi_ratio > 0 else 0
        self.phi = nn.ModuleList(Phi(config.code_width, config.phi_ratio) for _ in range(num_phi))
        self.phi_of_scale = pyramid.phi_index(num_phi) if num_phi else ()
        self.tables = pyramid
        """The pyramid of `usage_KV`; `at` gives the quantiser at another one."""
        # How often each code was used lately, per scale; the official checkpoints carry it, inference ignores it.
        self.register_buffer("usage_KV", torch.zeros(len(pyramid), config.vocab_size))

    def at(self, pyramid: Pyramid) -> Quantizer:
        """The quantiser at another pyramid, with the same codebook and convolutions; the usage of codes stays that of
        `tables`."""
        from nextscale.common.modules import share_parameters

        view = share_parameters(self)
        view.pyramid, view.phi_of_scale = pyramid, pyramid.phi_index(len(self.phi)) if self.phi else ()
        return view

    def codes(self, tokens_BN: Tensor) -> Tensor:
        """Token indices (B, N) to codes (B, N, c)."""
        return self.codebook(tokens_BN)

    def upsample_codes(self, codes_BNC: Tensor, k: int) -> Tensor:
        """What scale k adds to the canvas (B, c, h, w): its codes as a map, bicubic to the canvas side, through phi."""
        h_BChw = codes_BNC.transpose(1, 2).unflatten(-1, self.pyramid.sides[k])
        h_BChw = upsample(h_BChw, self.pyramid.last).contiguous()
        return self.phi[self.phi_of_scale[k]](h_BChw) if self.phi else h_BChw

    def next_input(self, canvas_BChw: Tensor, k: int) -> Tensor:
        """What the canvas shows at scale k (B, N, c): its area average at that side, row by row."""
        return downsample(canvas_BChw, self.pyramid.sides[k]).flatten(2).transpose(1, 2)

    def find_nearest(self, z_BNC: Tensor) -> Tensor:
        """Index of the nearest code for every row (B, N): Euclidean, or by cosine when so configured."""
        codebook_VC = self.codebook.weight
        z_RC = z_BNC.reshape(-1, z_BNC.shape[-1])
        if self.config.cosine_lookup:
            index_R = self.compare(F.normalize(z_RC, dim=-1), F.normalize(codebook_VC, dim=-1)).argmax(dim=-1)
        else:
            squares_RV = z_RC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1)
            index_R = (squares_RV - 2 * self.compare(z_RC, codebook_VC)).argmin(dim=-1)
        return index_R.view(z_BNC.shape[:-1])

    def compare(self, z_RC: Tensor, codebook_VC: Tensor) -> Tensor:
        """Scalar product of every row with every code, (R, V)."""
        return z_RC @ codebook_VC.T

    def mix_codes(self, probability_BNV: Tensor) -> Tensor:
        """Codes (B, N, c) mixed with these weights."""
        return probability_BNV @ self.codebook.weight

    def encode_scales(self, features_BChw: Tensor) -> Iterator[EncodedScale]:
        """Encode coarse to fine, yielding each scale as it is done.

        Each scale takes the codes nearest to the residual. Gradients reach codebook and phi.
        """
        residual = features_BChw.detach()
        canvas = torch.zeros_like(residual)
        for k in range(len(self.pyramid)):
            with torch.no_grad():
                residual_BNC = self.next_input(residual, k)
                tokens_BN = self.find_nearest(residual_BNC)
            h_BChw = self.upsample_codes(self.codes(tokens_BN), k)
            canvas, residual = canvas + h_BChw, residual - h_BChw.detach()
            yield EncodedScale(tokens_BN, residual_BNC, canvas)

    def forward(self, features_BChw: Tensor, decoded_scales_B: Tensor | None = None) -> Quantized:
        """Quantise in training: straight-through features, the loss of VAR's tokenizer, and the tokens.

        `decoded_scales_B`: how many scales, 1 to K, each image is decoded from; without it, all.
        """
        features = features_BChw.float()
        loss, scales = features.new_zeros(()), []
        with compute_exactly(features):  # rounding would change tokens
            for scale in self.encode_scales(features):
                scales.append(scale)
                loss = loss + F.mse_loss(scale.canvas_BChw, features.detach())
                loss = loss + self.config.commitment * F.mse_loss(scale.canvas_BChw.detach(), features)
        canvas_BChw = scales[-1].canvas_BChw
        if decoded_scales_B is not None:
            canvas_KBChw = torch.stack([scale.canvas_BChw.detach() for scale in scales])
            canvas_BChw = canvas_KBChw[decoded_scales_B - 1, torch.arange(len(features), device=features.device)]
        return Quantized(
            features + (canvas_BChw - features).detach(),
            loss / len(self.pyramid),
            torch.cat([s.tokens_BN for s in scales], dim=1),
            torch.cat([s.residual_BNC for s in scales], dim=1),
        )


def downsample(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Area down-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="area")


def upsample(x_BChw: Tensor, side: tuple[int, int]) -> Tensor:
    """Bicubic up-sampling to (h, w); the input itself when it has that side."""
    return x_BChw if x_BChw.shape[-2:] == side else F.interpolate(x_BChw, side, mode="bicubic")
