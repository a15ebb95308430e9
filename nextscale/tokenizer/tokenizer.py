"""VAR's multi-scale tokenizer: image to tokens of all scales, and tokens to image.

Teacher forcing, sampling and reconstruction are made of four functions: `encode`, `add_scale`, `next_input` and
`decode_canvas`. Images are float (B, 3, H, W) in [-1, 1]; tokens are int64 (B, L), coarse to fine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.checks import check_floats, check_range, check_uint8
from nextscale.common.devices import copy_to
from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for, compute_exactly
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.autoencoder import Decoder, Encoder
from nextscale.tokenizer.quantizer import Quantized, Quantizer


def scale_to_unit(images_u8: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float32 in [-1, 1]. UserError for others."""
    check_uint8("scaling to [-1, 1]", images_u8)
    return images_u8.float() / 127.5 - 1


class Tokenizer(nn.Module):
    """Multi-scale VQ-VAE (VAR, arXiv 2404.02905; MEPA Eq. 1-3).

    `encode(image)` gives tokens, `decode_canvas(canvas)` an image. `add_scale` adds one token map to the canvas
    (B, c, h, w), from which `next_input` reads what the next scale may see. The encoder and the quantiser, which choose
    tokens, compute in full float32 (`nextscale.common.precision`), the decoder in the dtype of its weights.
    """

    def __init__(self, config: TokenizerConfig, pyramid: Pyramid):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        self.decode_batch = 0
        """How many images are decoded at once; 0: as many as a GPU's memory holds. Images do not depend on it."""
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        kernel = config.quant_conv_kernel
        self.quant_conv = nn.Conv2d(config.code_width, config.code_width, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.code_width, kernel, padding=kernel // 2)
        self.quantizer = Quantizer(config, pyramid)

    def at(self, pyramid: Pyramid) -> Tokenizer:
        """The tokenizer at another pyramid: the same weights, for images and canvases of its last side."""
        if pyramid == self.pyramid:
            return self
        from nextscale.common.modules import share_parameters

        view = share_parameters(self, quantizer=self.quantizer.at(pyramid))
        view.pyramid = pyramid
        return view

    def set_compute_dtype(self, dtype: torch.dtype) -> Tokenizer:
        """Convert the decoder to `dtype`; what chooses tokens stays in float32, where rounding would change them."""
        self.float()
        self.decoder.to(dtype)
        self.post_quant_conv.to(dtype)
        return self

    # image -> tokens

    def extract_features(self, image_B3HW: Tensor) -> Tensor:
        """Feature map (B, c, h, w), float32, of images (B, 3, H, W) in [-1, 1]."""
        check_floats("the tokenizer", image_B3HW)
        h, w = (s * self.config.downsampling for s in self.pyramid.last)
        if image_B3HW.shape[1:] != (3, h, w):
            raise UserError(f"the tokenizer takes images of shape (B, 3, {h}, {w}); got {tuple(image_B3HW.shape)}")
        return self.quant_conv(self.encoder(image_B3HW.to(self.quant_conv.weight.dtype))).float()

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Tokens (B, L) of images (B, 3, H, W) in [-1, 1].

        UserError for images of another kind, shape or range, and when the encoder's features are not finite.
        """
        check_floats("the tokenizer", image_B3HW)
        check_range("the tokenizer", image_B3HW)
        with compute_exactly(image_B3HW):
            features_BChw = self.extract_features(image_B3HW)
            _check_finite("the encoder's features", features_BChw)
            return torch.cat([scale.tokens_BN for scale in self.quantizer.encode_scales(features_BChw)], dim=1)

    # tokens -> canvas -> what the transformer may see

    def new_canvas(self, batch: int) -> Tensor:
        """The empty canvas (B, c, h, w), float32."""
        weight = self.quantizer.codebook.weight
        return weight.new_zeros(batch, self.config.code_width, *self.pyramid.last, dtype=torch.float32)

    def add_codes(self, canvas_BChw: Tensor, codes_BNC: Tensor, k: int) -> Tensor:
        """The canvas after scale k, given its codes (B, N, c): mixtures of codes are allowed."""
        with compute_exactly(canvas_BChw):
            return canvas_BChw + self.quantizer.upsample_codes(codes_BNC, k)

    def add_scale(self, canvas_BChw: Tensor, tokens_BN: Tensor, k: int) -> Tensor:
        """The canvas after scale k, given its tokens (B, N)."""
        return self.add_codes(canvas_BChw, self.quantizer.codes(tokens_BN), k)

    def next_input(self, canvas_BChw: Tensor, k: int) -> Tensor:
        """What the transformer sees at scale k (B, N, c), given the canvas after scale k-1."""
        return self.quantizer.next_input(canvas_BChw, k)

    @torch.no_grad()
    def teacher_inputs(self, tokens_BL: Tensor, *, checked: bool = False) -> Tensor:
        """What the transformer sees at scales 1 to K-1, given all tokens: (B, L - N of scale 0, c), float32.

        `checked`: `check_tokens` has seen the tokens before they went to the device, which then need not be waited for.
        """
        canvases = list(self.build_canvases(tokens_BL, checked=checked))
        inputs = [self.next_input(canvas, k) for k, canvas in enumerate(canvases[:-1], start=1)]
        return torch.cat(inputs or [canvases[0].new_zeros(tokens_BL.shape[0], 0, self.config.code_width)], dim=1)

    def build_canvases(self, tokens_BL: Tensor, *, checked: bool = False) -> Iterator[Tensor]:
        """The canvas (B, c, h, w) after each scale. `checked` as in `teacher_inputs`."""
        tokens_BL = tokens_BL if checked else self.move_tokens(tokens_BL)
        canvas = self.new_canvas(tokens_BL.shape[0])
        for k, (start, end) in enumerate(self.pyramid.spans):
            canvas = self.add_scale(canvas, tokens_BL[:, start:end], k)
            yield canvas

    def move_tokens(self, tokens_BL: Any) -> Tensor:
        """Tokens of any integer type, of torch or numpy, as int64 on the model's device, once they are checked."""
        return copy_to(self.check_tokens(tokens_BL), self.quantizer.codebook.weight.device).to(torch.int64)

    def check_tokens(self, tokens_BL: Any) -> Tensor:
        """Tokens of any integer type, of torch or numpy, as a tensor where they are: on a GPU the host waits once.

        Raises UserError unless they are (B, L) indices into the codebook.
        """
        length, vocab = self.pyramid.length, self.config.vocab_size
        tokens_BL = torch.as_tensor(tokens_BL)
        if tokens_BL.is_floating_point() or tokens_BL.is_complex() or tokens_BL.dtype == torch.bool:
            raise UserError(f"tokens must be whole numbers; got {str(tokens_BL.dtype).removeprefix('torch.')}")
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] != length:
            raise UserError(f"pyramid {self.pyramid} takes tokens (B, {length}); got {tuple(tokens_BL.shape)}")
        if tokens_BL.numel():
            smallest, largest = torch.stack(torch.aminmax(tokens_BL.long())).cpu().tolist()
            if not 0 <= smallest <= largest < vocab:
                raise UserError(f"tokens must lie in 0 to {vocab - 1}; got {smallest}..{largest}")
        return tokens_BL

    # canvas -> image

    def decode_features(self, features_BChw: Tensor) -> Tensor:
        """Image (B, 3, H, W), not clamped, of a canvas or of straight-through features."""
        return self.decoder(self.post_quant_conv(cast_for(self.post_quant_conv, features_BChw))).float()

    @torch.no_grad()
    def decode_canvas(self, canvas_BChw: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1], float32, of a canvas; `decode_batch` images at a time. UserError when the
        decoder's output is not finite."""
        parts = canvas_BChw.split(self.decode_batch or self._count_at_once(canvas_BChw))
        images = [self.decode_features(part) for part in parts]
        image_B3HW = torch.cat(images) if len(images) > 1 else images[0]
        _check_finite("the decoder's images", image_B3HW)
        return image_B3HW.clamp(-1, 1)

    def _count_at_once(self, canvas_BChw: Tensor) -> int:
        """How many images to decode at once: on a GPU as many as its free memory holds, else all."""
        if canvas_BChw.device.type == "cuda":
            from nextscale.tokenizer.decoding import count_at_once

            dtype = self.post_quant_conv.weight.dtype
            return count_at_once(self.config, self.pyramid.last, dtype, canvas_BChw.device)
        return max(len(canvas_BChw), 1)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] of the tokens of all scales."""
        *_, canvas = self.build_canvases(tokens_BL)
        return self.decode_canvas(canvas)

    def forward(self, image_B3HW: Tensor, decoded_scales_B: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """Training: reconstruction (B, 3, H, W), not clamped, and what the quantiser says of the pass.

        `decoded_scales_B`: int64, how many scales each image is decoded from; without it, all.
        """
        quantized = self.quantizer(self.extract_features(image_B3HW), decoded_scales_B)
        return self.decode_features(quantized.features_BChw), quantized


def _check_finite(what: str, values: Tensor) -> None:
    """Raise UserError when a value is not finite, or all are so large that their sum is not: a synchronisation."""
    if not values.sum().isfinite():
        raise UserError(f"{what} are not finite: the tokenizer's weights are damaged, or overflow in this dtype")
