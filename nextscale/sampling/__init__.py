"""From settings to a sampler: puts guidance, filters, editing and the other parts around the loop of `sampler.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.config.sampling import SampleConfig, count_scales
from nextscale.sampling.draw import PerImageRandom, RandomSource
from nextscale.sampling.filters import build_filters
from nextscale.sampling.guidance import GuidedPredictor, count_sequences, schedule_parts, stack_copies
from nextscale.sampling.sampler import DrawTokens, EmbedTokens, LogitsProcessor, ModelPredictor, Predictor, Sampler
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

if TYPE_CHECKING:
    from nextscale.sampling.editing import Edit
    from nextscale.transformer.feed_forward.thresholds import Thresholds

CreatePredictor = Callable[[VAR, Any, "Thresholds | None", Sequence[int]], Predictor]
"""(model, condition values, thresholds of dynamic experts, sequences at each scale) to a predictor."""


@torch.no_grad()
def build_sampler(
    tokenizer: Tokenizer,
    model: VAR,
    values: Any,
    settings: SampleConfig,
    *,
    negative: Any = None,
    first_image: int = 0,
    edit: Edit | None = None,
    refiner: VAR | None = None,
    refiner_labels: Tensor | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    captured: CreatePredictor | None = None,
) -> Sampler:
    """The sampler of one batch. UserError when the settings do not fit the model or one another.

    `values`: the condition as `model.condition.parse` returned it. `negative`: as many values that guidance leads away
    from, in place of no condition. `first_image`: number of the batch's first image under the seed, so that a long run
    can be cut into batches without changing an image. `edit`: cells that hold given tokens instead of drawn ones.
    `refiner`: the model that generates the scales from `draft_scales` on; `refiner_labels`: its labels for those of the
    model, and for "no label", where they differ. `logits_processors`: your own, applied after guidance and before
    temperature and filters. `captured`: creates predictors that run captured graphs (`GraphPool.create_predictor`).
    """
    if settings.prune or settings.draft_scales or settings.official_seeding or refiner is not None or captured:
        from nextscale.sampling.combinations import Request, check_combinations

        request = Request(settings, model.config, refiner.config if refiner is not None else None, first_image)
        if captured is not None:
            from nextscale.sampling.capturing import skips_experts

            device = tokenizer.quantizer.codebook.weight.device
            request = replace(request, captured=True, fixed_experts=skips_experts(device))
        check_combinations(request)
    strengths_PK = schedule_parts(settings, model.pyramid)
    filters = build_filters(settings, len(model.pyramid))
    batch, sequences_K = len(values), [len(values) * count for count in count_sequences(*strengths_PK)]
    guided = sequences_K[0] > batch
    if guided:
        values = stack_copies(model.condition, values, list(settings.cfg_parts), negative)
    if captured is not None:
        predict = captured(model, values, _find_thresholds(model, settings), sequences_K)
    else:
        predict = _build_predictor(model, values, settings, refiner, refiner_labels)
    if guided:
        predict = GuidedPredictor(predict, strengths_PK)
    random = _build_random(settings, model, batch, tokenizer.quantizer.codebook.weight.device, first_image)
    draw: DrawTokens = random.draw_tokens
    embed = _build_embedding(tokenizer, settings, random)
    if edit is not None:
        draw, embed = edit.wrap_draw(draw, model.pyramid), edit.wrap_embed(embed, tokenizer)
    scales = count_scales(settings, len(model.pyramid))
    return Sampler(tokenizer, batch, predict, [*logits_processors, *filters], draw, embed, scales)


def _build_predictor(
    model: VAR, values: Any, settings: SampleConfig, refiner: VAR | None, refiner_labels: Tensor | None
) -> Predictor:
    """The predictor of logits before guidance."""
    if settings.prune:
        from nextscale.sampling.pruning import PrunedPredictor, PruningPlan

        plan = PruningPlan(model.pyramid, settings.prune, settings.prune_first_block)
        return PrunedPredictor(model, values, plan, _find_thresholds(model, settings))
    if refiner is None:
        return ModelPredictor(model, values, _find_thresholds(model, settings))
    from nextscale.sampling.collaborative import CollaborativePredictor, check_draft_scales, resolve_both_thresholds

    check_draft_scales(settings, len(model.pyramid))
    thresholds, refiner_thresholds = resolve_both_thresholds(model.config, refiner.config, model.pyramid, settings)
    predict = ModelPredictor(model, values, thresholds)
    theirs = values if refiner_labels is None else refiner_labels.to(values.device)[values]

    def start_refiner(count: int) -> ModelPredictor:
        return ModelPredictor(refiner, theirs[:count], refiner_thresholds)

    return CollaborativePredictor(predict, start_refiner, settings.draft_scales)


def _build_random(
    settings: SampleConfig, model: VAR, batch: int, device: torch.device, first_image: int
) -> RandomSource:
    if settings.official_seeding:
        from nextscale.sampling.official_seeding import OfficialRandom

        return OfficialRandom(settings.seed, device)
    return PerImageRandom(settings.seed, model.pyramid, batch, device, first_image)


def _build_embedding(tokenizer: Tokenizer, settings: SampleConfig, random: RandomSource) -> EmbedTokens:
    if settings.smooth:
        from nextscale.sampling.smooth import SmoothEmbedding

        return SmoothEmbedding(tokenizer, random)

    def look_up(tokens_BN: Tensor, logits_BNV: Tensor, k: int) -> Tensor:
        return tokenizer.quantizer.codes(tokens_BN)

    return look_up


def _find_thresholds(model: VAR, settings: SampleConfig) -> Thresholds | None:
    """Thresholds of dynamic experts: the settings', or the model's own; None where all experts work."""
    if not (settings.sets_thresholds or model.config.dynamic.tau):
        return None
    from nextscale.transformer.feed_forward.thresholds import resolve_thresholds

    return resolve_thresholds(model.config, len(model.pyramid), settings)
