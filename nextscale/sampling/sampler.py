"""The sampling loop: one step per scale, with the same model and the same canvas arithmetic as in training.

The loop calls plain functions: predict, processors, draw, embed. `build_sampler` in `build.py` assembles them from
settings; guidance, editing and the other features wrap them.

Letters: B batch, N tokens of one scale, L of all scales, V codes, C code width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.tokenizer.quantizer import downsample
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.var import VAR, Output

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.thresholds import Thresholds

Predictor = Callable[[Tensor | None, int], Output]
"""(x_BNC, k) to logits and records of scale k, called once for each scale in order. `x_BNC`: the tokenizer's next
input, None at scale 0. A predictor holds the state of one batch, such as its KV cache. `x_BNC` may have fewer sequences
than at the scale before: the first ones go on, the others are finished (guidance that ends)."""

LogitsProcessor = Callable[[Tensor, int], Tensor]
"""(logits_BNV, k) to logits of the same shape: temperature, a filter, or a rule of your own. Not in place."""

DrawTokens = Callable[[Tensor, int], Tensor]
"""(logits_BNV, k) to tokens (B, N), int64."""

EmbedTokens = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens_BN, logits_BNV, k) to codes (B, N, C), which are added to the canvas."""


class ModelPredictor:
    """A transformer's steps for one batch of condition values, with a KV cache. `thresholds`: of dynamic experts."""

    @torch.no_grad()
    def __init__(self, model: VAR, values: Any, thresholds: Thresholds | None = None):
        self.model, self.thresholds = model, thresholds
        self.conditioning = model.embed_condition(values)
        self.cache = model.new_cache(len(values))

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        self.finish_sequences(x_BNC)
        return self.model.step(self.conditioning, x_BNC, k, self.cache, thresholds=self.thresholds)

    def finish_sequences(self, x_BNC: Tensor | None) -> None:
        """Go on with as many sequences as `x_BNC` has, the first ones."""
        if x_BNC is not None and len(x_BNC) < len(self.conditioning.cond_BD):
            self.conditioning = self.conditioning.first(len(x_BNC))
            self.cache = self.model.first_of_cache(self.cache, len(x_BNC))

    def prefill(self, x_BLC: Tensor, k: int) -> Output:
        """As a call for scale k, by a model that has not seen earlier scales. `x_BLC`: the inputs of scales 1 to k."""
        return self.model.prefill(self.conditioning, x_BLC, k, self.cache, thresholds=self.thresholds)


@dataclass(frozen=True)
class Sampler:
    """The parts of the loop for one batch. Run it once: predictor and random source keep state."""

    tokenizer: Tokenizer
    batch: int
    predict: Predictor
    processors: Sequence[LogitsProcessor]
    """Applied in order, after guidance."""
    draw: DrawTokens
    embed: EmbedTokens
    scales: int = 0
    """How many scales are generated; 0: all."""

    @property
    def count(self) -> int:
        """The number of scales that are generated."""
        return self.scales or len(self.tokenizer.pyramid)


@dataclass(frozen=True)
class ScaleStep:
    """The result of one scale."""

    k: int
    logits_BNV: Tensor
    """After guidance, before processors, temperature and filters."""
    tokens_BN: Tensor
    canvas_BChw: Tensor
    """The canvas with this scale added; `tokenizer.decode_canvas(canvas)` is the image so far."""
    records: list[Record | None]
    """What the feed-forward of each block reports at this scale, of all sequences; empty with captured graphs."""


@torch.no_grad()
def sample_scales(sampler: Sampler) -> Iterator[ScaleStep]:
    """Sample a batch, scale by scale, coarse to fine (VAR, arXiv 2404.02905)."""
    tokenizer = sampler.tokenizer
    canvas, x_BNC = tokenizer.new_canvas(sampler.batch), None
    for k in range(sampler.count):
        if k > 0:
            x_BNC = tokenizer.next_input(canvas, k)
        prediction = sampler.predict(x_BNC, k)  # logits, after guidance
        logits = prediction.logits_BNV
        for process in sampler.processors:  # your own, then temperature, top-k and top-p
            logits = process(logits, k)
        tokens = sampler.draw(logits, k)
        codes = sampler.embed(tokens, logits, k)
        canvas = tokenizer.add_codes(canvas, codes, k)
        yield ScaleStep(k, prediction.logits_BNV, tokens, canvas, prediction.records)


@dataclass(frozen=True)
class SampledImages:
    """Generated images."""

    tokens_BL: Tensor
    """int64, all scales that were generated, coarse to fine."""
    images_B3HW: Tensor
    """float32 in [0, 1]."""
    growth: tuple[Tensor, ...]
    """The images after each scale, coarse to fine, if asked for; the last are `images_B3HW`."""


@torch.no_grad()
def sample_images(sampler: Sampler, *, growth: bool = False) -> SampledImages:
    """Sample a batch of images: `sample_scales` run to its end. UserError when the logits are not finite.

    `growth`: decode the canvas after each scale, not only after the last one.
    """
    tokenizer = sampler.tokenizer
    tokens, canvases, last = [], [], sampler.count - 1
    for step in check_finite(sample_scales(sampler)):
        tokens.append(step.tokens_BN)
        if growth or step.k == last:
            canvases.append(step.canvas_BChw)
    images = [(tokenizer.decode_canvas(canvas) + 1) / 2 for canvas in canvases]
    if sampler.scales:  # a decoder makes more of the whole canvas than of one at the side of the last scale
        height, width = (side * tokenizer.config.downsampling for side in tokenizer.pyramid.sides[last])
        images = [downsample(image, (height, width)) for image in images]
    return SampledImages(torch.cat(tokens, dim=1), images[-1], tuple(images) if growth else ())


def check_finite(steps: Iterator[ScaleStep]) -> Iterator[ScaleStep]:
    """Yield the same steps; UserError after the last one if logits were not finite: one device synchronisation."""
    finite: Tensor | bool = True
    for step in steps:
        finite = step.logits_BNV.isfinite().all() & finite
        yield step
    check_finite_logits(finite)


def check_finite_logits(finite: Tensor | bool) -> None:
    """Raise UserError unless logits are finite."""
    if not finite:
        raise UserError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
