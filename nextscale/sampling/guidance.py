"""Classifier-free guidance, wrapped around a predictor. Letters: B batch, N tokens of one scale, V codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nextscale.config.sampling import list_per_scale
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import Predictor
from nextscale.transformer.var import Output


class GuidedPredictor:
    """Runs `predict` on the batch and its unconditional copy at once, and combines both logits.

    `predict` must have been made for `condition.add_unconditional(values)`, 2 B sequences. `strengths`: one for each
    scale.
    """

    def __init__(self, predict: Predictor, strengths: Sequence[float]):
        self.predict, self.strengths = predict, strengths

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        both = self.predict(None if x_BNC is None else x_BNC.repeat(2, 1, 1), k)
        conditional, unconditional = both.logits_BNV.chunk(2)
        return replace(both, logits_BNV=guide_logits(conditional, unconditional, self.strengths[k]))


def guide_logits(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: (1 + t) conditional - t unconditional."""
    return (1 + strength) * conditional - strength * unconditional


def schedule_guidance(cfg: float | tuple[float, ...], pyramid: Pyramid) -> tuple[float, ...]:
    """The strength at each scale. One number grows linearly from 0 at the first scale to `cfg` at the last (VAR)."""
    if isinstance(cfg, tuple):
        return list_per_scale("cfg", cfg, len(pyramid))
    return tuple(cfg * pyramid.progress(k) for k in range(len(pyramid)))
