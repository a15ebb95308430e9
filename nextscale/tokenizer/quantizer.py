"""Residual quantisation over the scales: the law that turns token maps into a canvas and back.

Letters: B batch, N tokens of one scale, L of all scales, K scales, V codes, c code width (C in suffixes), h w the
canvas side. The law has two halves, and every use (encoding, teacher forcing, decoding, sampling, training) calls
them: `lift` says what one token map adds to the canvas, `next_input` what the canvas shows to the next scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.ops import Conv2d, Embedding, enlarge, linear, shrink
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.pyramid import Pyramid


class Phi(Conv2d):
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
    wanted_BNC: Tensor
    """What the canvas lacked at this side: the vectors that were looked up."""
    canvas_BChw: Tensor
    """The canvas with this scale on it."""


@dataclass(frozen=True)
class Quantized:
    """One pass of the quantiser in training."""

    features_BChw: Tensor
    """The canvas in value, the encoder's features in gradient (straight-through)."""
    loss: Tensor
    """Codebook and commitment loss, mean over the scales."""
    tokens_BL: Tensor
    wanted_BLC: Tensor
    """The vectors that were looked up, without gradient: what codes should be near to."""


class Quantizer(nn.Module):
    """Codebook, phi convolutions and the residual loop over scales. Always computes in float32."""

    usage_KV: Tensor

    def __init__(self, config: TokenizerConfig, pyramid: Pyramid):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        self.codebook = Embedding(config.vocab_size, config.code_width)
        # As small as the features of a fresh encoder: codes drawn far outside them are never chosen, so never learn.
        if not self.codebook.weight.is_meta:
            nn.init.normal_(self.codebook.weight, std=0.1)
        num_phi = config.num_phi if config.phi_ratio > 0 else 0
        self.phi = nn.ModuleList(Phi(config.code_width, config.phi_ratio) for _ in range(num_phi))
        self.phi_of_scale = pyramid.phi_index(num_phi) if num_phi else ()
        # How often each code was used lately, per scale; the official checkpoints carry it, inference ignores it.
        self.register_buffer("usage_KV", torch.zeros(len(pyramid), config.vocab_size))

    def codes(self, tokens_BN: Tensor) -> Tensor:
        """Token indices (B, N) to codes (B, N, c)."""
        return self.codebook(tokens_BN)

    def lift(self, codes_BNC: Tensor, k: int) -> Tensor:
        """What scale k adds to the canvas (B, c, h, w): its codes as a map, bicubic to the canvas side, through phi."""
        h_BChw = codes_BNC.transpose(1, 2).unflatten(-1, self.pyramid.sides[k])
        h_BChw = enlarge(h_BChw, self.pyramid.last).contiguous()
        return self.phi[self.phi_of_scale[k]](h_BChw) if self.phi else h_BChw

    def next_input(self, canvas_BChw: Tensor, k: int) -> Tensor:
        """What the canvas shows at scale k (B, N, c): its area average at that side, row by row."""
        return shrink(canvas_BChw, self.pyramid.sides[k]).flatten(2).transpose(1, 2)

    def nearest(self, z_BNC: Tensor) -> Tensor:
        """Index of the nearest code for every row (B, N): Euclidean, or by cosine when so configured."""
        book_VC = self.codebook.weight
        z_RC = z_BNC.reshape(-1, z_BNC.shape[-1])
        if self.config.cosine_lookup:
            index_R = linear(F.normalize(z_RC, dim=-1), F.normalize(book_VC, dim=-1)).argmax(dim=-1)
        else:
            distance_RV = (z_RC.square().sum(1, keepdim=True) + book_VC.square().sum(1)) - 2 * linear(z_RC, book_VC)
            index_R = distance_RV.argmin(dim=-1)
        return index_R.view(z_BNC.shape[:-1])

    def scales(self, features_BChw: Tensor) -> Iterator[EncodedScale]:
        """Encode coarse to fine, yielding each scale as it is done.

        Each scale takes the codes nearest to what the canvas still lacks. Gradients reach codebook and phi.
        """
        rest = features_BChw.detach()
        canvas = torch.zeros_like(rest)
        for k in range(len(self.pyramid)):
            with torch.no_grad():
                wanted_BNC = self.next_input(rest, k)
                tokens_BN = self.nearest(wanted_BNC)
            h_BChw = self.lift(self.codes(tokens_BN), k)
            canvas, rest = canvas + h_BChw, rest - h_BChw.detach()
            yield EncodedScale(tokens_BN, wanted_BNC, canvas)

    def forward(self, features_BChw: Tensor) -> Quantized:
        """Quantise in training: straight-through features, the loss of VAR's tokenizer, and the tokens."""
        features = features_BChw.float()
        loss, scales = features.new_zeros(()), []
        with torch.autocast(features.device.type, enabled=False):  # rounding would change tokens
            for scale in self.scales(features):
                scales.append(scale)
                loss = loss + F.mse_loss(scale.canvas_BChw, features.detach())
                loss = loss + self.config.commitment * F.mse_loss(scale.canvas_BChw.detach(), features)
        return Quantized(
            features + (scales[-1].canvas_BChw - features).detach(),
            loss / len(self.pyramid),
            torch.cat([s.tokens_BN for s in scales], dim=1),
            torch.cat([s.wanted_BNC for s in scales], dim=1),
        )
