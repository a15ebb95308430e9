"""Collaborative decoding (CoDe, arXiv 2411.17787): a second, usually smaller model generates the last scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.sampling.sampler import ModelPredictor, Predictor
from nextscale.tokenizer.tokenizer import Tokenizer
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


def check_refiner(config: ModelConfig, tokenizer: Tokenizer, refiner: ModelConfig, other: Tokenizer) -> None:
    """UserError unless the refiner's config and tokenizer, `refiner` and `other`, fit those of the main model."""
    assert config.transformer is not None, "a tokenizer alone is not refined"
    fits = refiner.pyramid == config.pyramid and refiner.tokenizer == config.tokenizer
    if not fits or refiner.transformer is None or refiner.transformer.condition != config.transformer.condition:
        raise UserError("a refiner must have this model's scales, tokenizer and classes; its config differs")
    if not torch.equal(other.quantizer.codebook.weight, tokenizer.quantizer.codebook.weight):
        raise UserError("a refiner must have been trained with this model's tokenizer; its codebook differs")
