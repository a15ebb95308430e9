"""The model as a predictor: one `step` per scale with a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.transformer.var import VAR, Output

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.thresholds import Thresholds


class ModelPredictor:
    """A transformer's steps for one batch of condition values. `thresholds`: of dynamic experts."""

    @torch.no_grad()
    def __init__(self, model: VAR, values: Any, thresholds: Thresholds | None = None):
        self.model, self.thresholds = model, thresholds
        self.conditioning = model.embed_condition(values)
        self.cache = model.new_cache(len(values))

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        return self.model.step(self.conditioning, x_BNC, k, self.cache, thresholds=self.thresholds)

    def prefill(self, x_BLC: Tensor, k: int) -> Output:
        """As a call for scale k, by a model that has not seen earlier scales. `x_BLC`: the inputs of scales 1 to k."""
        return self.model.prefill(self.conditioning, x_BLC, k, self.cache, thresholds=self.thresholds)
