"""The sampling loop: one step per scale, the same model and the same law of the canvas as in training.

Letters: B batch, N tokens of one scale, L of all scales, V codes, C code width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.config import SampleConfig
from nextscale.errors import UserError
from nextscale.model.var import VAR
from nextscale.ops import linear
from nextscale.sample.draw import ImageStreams, OfficialStream, Stream
from nextscale.sample.logits import filtered, guide
from nextscale.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScaleStep:
    """One scale, done."""

    k: int
    logits_BNV: Tensor
    """After guidance, before temperature and filters."""
    tokens_BN: Tensor
    canvas_BChw: Tensor
    """The canvas with this scale on it; `tokenizer.paint(canvas)` is the picture so far."""


@dataclass(frozen=True)
class Kept:
    """Cells that an edit keeps, and what they hold."""

    tokens_BL: Tensor
    """Tokens of the image that is edited."""
    keep_BL: Tensor
    """bool, True where the image's token stays."""


@torch.no_grad()
def generate_scales(
    tokenizer: Tokenizer,
    model: VAR,
    values: Any,
    config: SampleConfig,
    first_image: int = 0,
    kept: Kept | None = None,
) -> Iterator[ScaleStep]:
    """Sample a batch, yielding each scale as it is done.

    `values`: the condition as `model.condition.parse` returned it. `first_image`: number of the batch's first image
    under the seed, so that a long run can be cut into batches without changing an image. `kept`: cells that hold
    given tokens instead of drawn ones (editing).
    """
    pyramid, batch = model.pyramid, len(values)
    guided = config.cfg > 0
    both = model.condition.with_none(values) if guided else values
    conditioning, cache = model.conditioning(both), model.new_cache(len(both))
    stream = _stream(config, first_image, tokenizer.quantizer.codebook.weight.device)
    canvas, x_BNC = tokenizer.blank_canvas(batch), None
    for k in range(len(pyramid)):
        if x_BNC is not None and guided:
            x_BNC = x_BNC.repeat(2, 1, 1)
        logits = model.step(conditioning, x_BNC, k, cache).logits_BNV
        if guided:
            logits = guide(logits[:batch], logits[batch:], config.cfg * pyramid.progress(k))
        likely = filtered(logits, config.temperature, config.top_k, config.top_p)
        tokens = stream.tokens(likely, k)
        mixed = _mixed_codes(tokenizer, likely, stream, k) if config.smooth else None
        if kept is not None:
            start, end = pyramid.spans[k]
            keep_BN, given_BN = kept.keep_BL[:, start:end], kept.tokens_BL[:, start:end]
            tokens = torch.where(keep_BN, given_BN, tokens)
            if mixed is not None:
                mixed = torch.where(keep_BN.unsqueeze(-1), tokenizer.quantizer.codes(given_BN), mixed)
        codes = tokenizer.quantizer.codes(tokens) if mixed is None else mixed
        canvas = tokenizer.add_codes(canvas, codes, k)
        yield ScaleStep(k, logits, tokens, canvas)
        x_BNC = tokenizer.next_input(canvas, k + 1) if k + 1 < len(pyramid) else None


def _stream(config: SampleConfig, first_image: int, device: torch.device) -> Stream:
    if config.official_seeding:
        return OfficialStream(config.seed, device)
    return ImageStreams(config.seed, first_image)


def _mixed_codes(tokenizer: Tokenizer, likely_BNV: Tensor, stream: Stream, k: int) -> Tensor:
    """Smooth mode: codes (B, N, c) mixed by a Gumbel-softmax that sharpens towards the last scale."""
    ratio = tokenizer.pyramid.progress(k)
    temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
    noisy = likely_BNV * (1 + ratio) + stream.gumbel(likely_BNV, k)
    return linear((noisy / temperature).softmax(dim=-1), tokenizer.quantizer.codebook.weight.T)


@dataclass(frozen=True)
class Sample:
    """Generated images."""

    tokens_BL: Tensor
    """int64, all scales, coarse to fine."""
    images_B3HW: Tensor
    """float32 in [0, 1]."""


@torch.no_grad()
def generate(
    tokenizer: Tokenizer,
    model: VAR,
    values: Any,
    config: SampleConfig,
    first_image: int = 0,
    kept: Kept | None = None,
) -> Sample:
    """Sample a batch of images: `generate_scales` run to its end."""
    tokens, canvas = [], tokenizer.blank_canvas(len(values))
    finite = torch.ones((), dtype=torch.bool, device=canvas.device)
    for step in generate_scales(tokenizer, model, values, config, first_image, kept):
        tokens.append(step.tokens_BN)
        finite &= step.logits_BNV.isfinite().all()
        canvas = step.canvas_BChw
    if not finite:
        raise UserError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
    return Sample(torch.cat(tokens, dim=1), (tokenizer.paint(canvas) + 1) / 2)


@torch.no_grad()
def log_likelihood(tokenizer: Tokenizer, model: VAR, tokens_BL: Tensor, values: Any) -> Tensor:
    """Log-probability in nats of given tokens under the model, summed within each scale: (B, K), float32.

    No guidance, temperature or filter: what the cross-entropy of training measures, times the tokens of the scale.
    """
    tokenizer.check_tokens(tokens_BL)
    logits_BLV = model(values, tokenizer.teacher_inputs(tokens_BL)).logits_BNV
    token_BL = logits_BLV.log_softmax(dim=-1).gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    return torch.stack([token_BL[:, start:end].sum(dim=1) for start, end in model.pyramid.spans], dim=1)
