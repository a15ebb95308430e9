"""From settings to a sampler: puts guidance, filters, editing and the other parts around the loop of `sampler.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.sampling.draw import OfficialRandom, PerImageRandom, RandomSource
from nextscale.sampling.filters import build_filters
from nextscale.sampling.guidance import GuidedPredictor, schedule_guidance
from nextscale.sampling.sampler import DrawTokens, EmbedTokens, LogitsProcessor, ModelPredictor, Predictor, Sampler
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

if TYPE_CHECKING:
    from nextscale.sampling.editing import Edit
    from nextscale.transformer.feed_forward.thresholds import Thresholds

CreatePredictor = Callable[[VAR, Any], Predictor]
"""(model, condition values) to a predictor."""


@torch.no_grad()
def build_sampler(
    tokenizer: Tokenizer,
    model: VAR,
    values: Any,
    settings: SampleConfig,
    *,
    first_image: int = 0,
    edit: Edit | None = None,
    refiner: VAR | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    captured: CreatePredictor | None = None,
) -> Sampler:
    """The sampler of one batch. UserError when the settings do not fit the model or one another.

    `values`: the condition as `model.condition.parse` returned it. `first_image`: number of the batch's first image
    under the seed, so that a long run can be cut into batches without changing an image. `edit`: cells that hold given
    tokens instead of drawn ones. `refiner`: the model that generates the scales from `draft_scales` on.
    `logits_processors`: your own, applied after guidance and before temperature and filters. `captured`: creates
    predictors that run captured graphs (`GraphPool.create_predictor`).
    """
    request = Request(
        settings, model.config, refiner.config if refiner else None, first_image, captured=captured is not None
    )
    check_combinations(request)
    strengths = schedule_guidance(settings.cfg, model.pyramid)
    filters = build_filters(settings, len(model.pyramid))
    if settings.guided:
        predict = _build_predictor(model, model.condition.add_unconditional(values), settings, refiner, captured)
        predict = GuidedPredictor(predict, strengths)
    else:
        predict = _build_predictor(model, values, settings, refiner, captured)
    random: RandomSource = PerImageRandom(settings.seed, first_image)
    if settings.official_seeding:
        random = OfficialRandom(settings.seed, tokenizer.quantizer.codebook.weight.device)
    draw: DrawTokens = random.draw_tokens
    embed = _build_embedding(tokenizer, settings, random)
    if edit is not None:
        draw, embed = edit.wrap_draw(draw, model.pyramid), edit.wrap_embed(embed, tokenizer)
    return Sampler(tokenizer, len(values), predict, [*logits_processors, *filters], draw, embed)


def _build_predictor(
    model: VAR, values: Any, settings: SampleConfig, refiner: VAR | None, captured: CreatePredictor | None
) -> Predictor:
    """The predictor of logits before guidance."""
    thresholds = _find_thresholds(model, settings)
    if captured is not None:
        return captured(model, values)
    if settings.prune:
        from nextscale.sampling.pruning import PrunedPredictor, PruningPlan

        plan = PruningPlan(model.pyramid, settings.prune, settings.prune_first_block)
        return PrunedPredictor(model, values, plan, thresholds)
    predict = ModelPredictor(model, values, thresholds)
    if refiner is None:
        return predict
    from nextscale.sampling.collaborative import CollaborativePredictor, check_draft_scales

    check_draft_scales(settings, len(model.pyramid))
    start_refiner = partial(ModelPredictor, refiner, values, _find_thresholds(refiner, settings))
    return CollaborativePredictor(predict, start_refiner, settings.draft_scales)


def _build_embedding(tokenizer: Tokenizer, settings: SampleConfig, random: RandomSource) -> EmbedTokens:
    if settings.smooth:
        from nextscale.sampling.smooth import SmoothEmbedding

        return SmoothEmbedding(tokenizer, random)

    def look_up(tokens_BN: Tensor, logits_BNV: Tensor, k: int) -> Tensor:
        return tokenizer.quantizer.codes(tokens_BN)

    return look_up


def _find_thresholds(model: VAR, settings: SampleConfig) -> Thresholds | None:
    """Thresholds of dynamic experts: the settings', or the model's own; None where all experts work."""
    if not (_sets_thresholds(settings) or model.config.dynamic.tau):
        return None
    from nextscale.transformer.feed_forward.thresholds import resolve_thresholds

    return resolve_thresholds(model.config, len(model.pyramid), settings)


@dataclass(frozen=True)
class Request:
    """What one call of the sampler combines."""

    settings: SampleConfig
    model: TransformerConfig
    refiner: TransformerConfig | None = None
    first_image: int = 0
    captured: bool = False


def check_combinations(request: Request) -> None:
    """UserError with the reason for the first combination that is refused."""
    for applies, reason in REFUSED:
        if applies(request):
            raise UserError(reason)


def _sets_thresholds(settings: SampleConfig) -> bool:
    return bool(settings.tau or settings.budget) or settings.selection != "threshold"


def _has_unprunable_layers(model: TransformerConfig) -> bool:
    """Whether a layer may need all tokens of a scale, or the record that the block before made of the same tokens."""
    mixers, feed_forwards = {"attention", "scale-attention"}, {"dense", "mixture", "dynamic"}
    routers = {"none", "smoe", "stmoe", "moe++", "expert-choice"}
    known = mixers >= set(model.mixers) and model.resolved_feed_forward in feed_forwards
    return not known or model.experts.router not in routers


def _prunes_scored_tokens(request: Request) -> bool:
    """Whether a block that MoE++'s gating residual reaches is pruned."""
    experts, first_block = request.model.experts, max(request.settings.prune_first_block, 1)
    residual = experts.router == "moe++" and experts.gating_residual
    return bool(request.settings.prune) and residual and request.model.depth > first_block


def _runs_few_experts(request: Request) -> bool:
    tau = request.settings.tau or request.model.dynamic.tau
    return bool(request.settings.budget) or min(tau, default=1) < 1


REFUSED: tuple[tuple[Callable[[Request], bool], str], ...] = (
    (
        lambda r: bool(r.settings.prune) and _has_unprunable_layers(r.model),
        "prune cannot work with mamba, whose state runs through every token, and is not known to work with layers of "
        "your own; sample without prune",
    ),
    (
        _prunes_scored_tokens,
        "prune cannot work with MoE++'s gating residual: a router uses the scores of the block before, and blocks "
        "compute different tokens; sample without prune, or train with experts.gating_residual false",
    ),
    (
        lambda r: bool(r.settings.prune) and r.refiner is not None,
        "draft_scales and prune cannot be combined: the refiner reads all tokens in one pass",
    ),
    (
        lambda r: bool(r.settings.draft_scales) and r.refiner is None,
        "draft_scales needs a refiner: a second model for the later scales",
    ),
    (
        lambda r: r.refiner is not None and _sets_thresholds(r.settings),
        "tau, budget and selection cannot be combined with a refiner, because each model has thresholds of its own: "
        "leave them out, then both use those of their checkpoints",
    ),
    (
        lambda r: r.settings.official_seeding and r.first_image != 0,
        "official_seeding draws all images from one generator, so they cannot start at image number first_image: "
        "sample all in one call",
    ),
    (
        lambda r: r.captured and bool(r.settings.prune),
        "captured steps cannot be combined with prune: sample without capture, or without prune",
    ),
    (
        lambda r: r.captured and r.refiner is not None,
        "captured steps cannot be combined with a refiner: sample without capture, or without the refiner",
    ),
    (
        lambda r: r.captured and _runs_few_experts(r),
        "captured steps have fixed shapes, but dynamic experts below tau 1 do not: sample without capture, or with "
        "tau 1",
    ),
)
"""Combinations that are refused, each with the reason. All others work together."""
