"""Collaborative decoding (CoDe, arXiv 2411.17787): a second, usually smaller model generates the last scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import ModelPredictor, Predictor
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.feed_forward.thresholds import Thresholds, resolve_thresholds
from nextscale.transformer.var import Output


class CollaborativePredictor:
    """`draft` predicts the scales before `switch`; the refiner reads them in one pass and predicts the others.

    `start_refiner` is called at the switch, when the draft's KV cache is freed, with the number of sequences, the first
    ones of the batch.
    """

    def __init__(self, draft: Predictor, start_refiner: Callable[[int], ModelPredictor], switch: int):
        self.predict, self.start_refiner, self.switch = draft, start_refiner, switch
        self.inputs_BNC: list[Tensor] = []
        """The inputs of scales 1 to k, for the refiner."""

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        if k > self.switch:
            return self.predict(x_BNC, k)
        if x_BNC is not None:
            self.inputs_BNC.append(x_BNC)
        if k < self.switch:
            return self.predict(x_BNC, k)
        count = len(self.inputs_BNC[-1])
        self.predict = refiner = self.start_refiner(count)
        prediction = refiner.prefill(torch.cat([x_BNC[:count] for x_BNC in self.inputs_BNC], dim=1), k)
        self.inputs_BNC.clear()
        return prediction


def check_draft_scales(settings: SampleConfig, scales: int) -> None:
    """UserError unless both models have scales to predict."""
    if not 1 <= settings.draft_scales < scales:
        raise UserError(
            f"with a refiner draft_scales must be 1 to {scales - 1}, the scales that are generated before it takes "
            f"over; got {settings.draft_scales}"
        )


def resolve_both_thresholds(
    model: TransformerConfig, refiner: TransformerConfig, pyramid: Pyramid, settings: SampleConfig
) -> tuple[Thresholds | None, Thresholds | None]:
    """The thresholds of the main model and of the refiner; None where all experts work.

    Thresholds of the settings hold for each model whose FFNs are divided into experts. UserError names the model at
    fault where they do not fit it, or where it has no experts at a scale that it generates and a threshold is for.
    """
    models = {"this model": model, "the refiner": refiner}
    resolved: list[Thresholds | None] = []
    for name, config in models.items():
        other = refiner if config is model else model
        if settings.sets_thresholds and other.dynamic.experts and not config.dynamic.experts:
            resolved.append(None)
            continue
        try:
            resolved.append(resolve_thresholds(config, len(pyramid), settings))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if settings.sets_thresholds:
        _check_effect(resolved, pyramid, settings)
    ours, theirs = resolved
    return ours, theirs


def _check_effect(resolved: list[Thresholds | None], pyramid: Pyramid, settings: SampleConfig) -> None:
    """UserError when a threshold is for a scale that a model without experts generates; where one number is for all
    scales with experts, when that holds for each of them."""
    wanted = [k for k in range(len(pyramid)) if any(t and t.tau_K[k] < 1 for t in resolved)]
    without = [k for k in wanted if resolved[k >= settings.draft_scales] is None]
    if without and (len(settings.tau) > 1 or without == wanted):
        height, width = pyramid.sides[without[0]]
        name = "the refiner" if without[0] >= settings.draft_scales else "this model"
        raise UserError(
            f"tau has no effect at {height}x{width}: {name} generates this scale, and its FFNs are not divided into "
            "experts; leave tau out, change draft_scales, or make experts with `nextscale sparsify`"
        )


def check_refiner(config: ModelConfig, tokenizer: Tokenizer, refiner: ModelConfig, other: Tokenizer) -> None:
    """UserError unless the refiner's config and tokenizer, `refiner` and `other`, fit those of the main model."""
    assert config.transformer is not None, "a tokenizer alone is not refined"
    fits = refiner.pyramid == config.pyramid and refiner.tokenizer == config.tokenizer
    if not fits or refiner.transformer is None or refiner.transformer.condition != config.transformer.condition:
        raise UserError("a refiner must have this model's scales, tokenizer and classes; its config differs")
    if not torch.equal(other.quantizer.codebook.weight, tokenizer.quantizer.codebook.weight):
        raise UserError("a refiner must have been trained with this model's tokenizer; its codebook differs")
