"""The sampling loop: one step per scale, the same model and the same law of the canvas as in training.

Letters: B batch, N tokens of one scale, L of all scales, V codes, C code width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nextscale.backends.cpu.ops import linear
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.sampling.draw import ImageStreams, OfficialStream, Stream
from nextscale.sampling.logits import filtered, guide
from nextscale.sampling.pruning import Pruning
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.feed_forward.thresholds import resolve_thresholds
from nextscale.transformer.var import VAR


@dataclass(frozen=True)
class ScaleStep:
    """One scale, done."""

    k: int
    logits_BNV: Tensor
    """After guidance, before temperature and filters."""
    tokens_BN: Tensor
    canvas_BChw: Tensor
    """The canvas with this scale on it; `tokenizer.paint(canvas)` is the picture so far."""
    records: list[list[Any]] = field(default_factory=list)
    """What each layer of each block recorded at this scale, of all sequences; empty where steps are captured."""


@dataclass(frozen=True)
class Kept:
    """Cells that an edit keeps, and what they hold."""

    tokens_BL: Tensor
    """Tokens of the image that is edited."""
    keep_BL: Tensor
    """bool, True where the image's token stays."""


class Steps(Protocol):
    """A transformer at work on one batch."""

    records: list[list[Any]]
    """Of the scale that was computed last."""

    def logits(self, inputs_BNC: list[Tensor], k: int) -> Tensor:
        """Logits (B, N, V) of scale k, given the tokenizer's inputs of scales 1 to k."""


class Eager:
    """`Steps` by plain calls. May begin at any scale: what came before is then caught up with in one pass."""

    def __init__(self, model: VAR, values: Any, config: SampleConfig):
        self.model, self.conditioning = model, model.conditioning(values)
        self.cache, self.seen = model.new_cache(len(values)), 0
        self.pruning, self.thresholds = (
            _pruning(model, config),
            resolve_thresholds(model.config, len(model.pyramid), config),
        )
        self.records: list[list[Any]] = []

    def logits(self, inputs_BNC: list[Tensor], k: int) -> Tensor:
        if self.seen < k:
            output = self.model.catch_up(
                self.conditioning, torch.cat(inputs_BNC, dim=1), k, self.cache, self.thresholds
            )
        else:
            output = self.model.step(
                self.conditioning, inputs_BNC[-1] if inputs_BNC else None, k, self.cache, self.pruning, self.thresholds
            )
        self.seen, self.records = k + 1, output.records
        return output.logits_BNV


@torch.no_grad()
def generate_scales(
    tokenizer: Tokenizer,
    model: VAR,
    values: Any,
    config: SampleConfig,
    first_image: int = 0,
    kept: Kept | None = None,
    refiner: VAR | None = None,
    begin: Callable[[VAR, Any, SampleConfig], Steps] = Eager,
) -> Iterator[ScaleStep]:
    """Sample a batch, yielding each scale as it is done.

    `values`: the condition as `model.condition.parse` returned it. `first_image`: number of the batch's first image
    under the seed, so that a long run can be cut into batches without changing an image. `kept`: cells that hold
    given tokens instead of drawn ones (editing). `refiner`: the model that draws the scales from `draft_scales` on
    (collaborative decoding, CoDe, arXiv 2411.17787). `begin` says how a model's steps are run.
    """
    pyramid, batch = model.pyramid, len(values)
    _check_refiner(config, refiner, len(pyramid))
    guided = config.cfg > 0
    both = model.condition.with_none(values) if guided else values
    steps = begin(model, both, config)
    stream = _stream(config, first_image, tokenizer.quantizer.codebook.weight.device)
    canvas = tokenizer.blank_canvas(batch)
    inputs: list[Tensor] = []
    for k in range(len(pyramid)):
        if refiner is not None and k == config.draft_scales:
            steps = begin(refiner, both, config)
        logits = steps.logits(inputs, k)
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
        yield ScaleStep(k, logits, tokens, canvas, steps.records)
        if k + 1 < len(pyramid):
            x_BNC = tokenizer.next_input(canvas, k + 1)
            inputs.append(x_BNC.repeat(2, 1, 1) if guided else x_BNC)


def _pruning(model: VAR, config: SampleConfig) -> Pruning | None:
    """The plan of these settings for this model, if they prune."""
    if not config.prune:
        return None
    experts, depth = model.config.experts, model.config.depth
    if "mamba" in model.config.mixers:
        raise UserError("prune cannot work with mamba, whose state runs through every token; sample without prune")
    if experts.router == "moe++" and experts.gating_residual and depth > max(config.prune_first_block, 1):
        raise UserError(
            "prune cannot work with MoE++'s gating residual: a router sees what the block before scored, and blocks "
            "compute different tokens; sample without prune, or train with experts.gating_residual false"
        )
    return Pruning(model.pyramid, config.prune, config.prune_first_block)


def watched(steps: Iterator[ScaleStep]) -> Iterator[ScaleStep]:
    """The same steps; after the last one UserError when a model's logits were not finite, so that nobody waits."""
    finite: Tensor | bool = True
    for step in steps:
        finite = step.logits_BNV.isfinite().all() & finite
        yield step
    if not finite:
        raise UserError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")


def _check_refiner(config: SampleConfig, refiner: VAR | None, scales: int) -> None:
    if refiner is None and config.draft_scales:
        raise UserError(f"draft_scales={config.draft_scales} needs a refiner: a second model for the later scales")
    if refiner is not None and not 1 <= config.draft_scales < scales:
        raise UserError(
            f"with a refiner draft_scales must be 1 to {scales - 1}, the scales that are drawn before it takes over; "
            f"got {config.draft_scales}"
        )


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
    refiner: VAR | None = None,
    begin: Callable[[VAR, Any, SampleConfig], Steps] = Eager,
) -> Sample:
    """Sample a batch of images: `generate_scales` run to its end."""
    tokens, canvas = [], tokenizer.blank_canvas(len(values))
    for step in watched(generate_scales(tokenizer, model, values, config, first_image, kept, refiner, begin)):
        tokens.append(step.tokens_BN)
        canvas = step.canvas_BChw
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
