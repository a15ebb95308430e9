"""Classifier-free guidance, wrapped around a predictor. Letters: B batch, N tokens of one scale, V codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig, list_per_scale
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import Predictor
from nextscale.transformer.var import Output


class GuidedPredictor:
    """Runs `predict` on the batch and its unconditional copy at once, and combines both logits.

    After the last guided scale the unconditional copy is left out: no later scale needs it. `predict` must have been
    made for `condition.add_unconditional(values)`, 2 B sequences. `strengths`: one for each scale.
    """

    def __init__(self, predict: Predictor, strengths: Sequence[float]):
        self.predict, self.strengths, self.sequences_K = predict, strengths, count_sequences(strengths)

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        if self.sequences_K[k] == 1:
            return self.predict(x_BNC, k)
        both = self.predict(None if x_BNC is None else x_BNC.repeat(2, 1, 1), k)
        conditional, unconditional = both.logits_BNV.chunk(2)
        return replace(both, logits_BNV=guide_logits(conditional, unconditional, self.strengths[k]))


def guide_logits(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: (1 + t) conditional - t unconditional."""
    return (1 + strength) * conditional - strength * unconditional


def schedule_guidance(settings: SampleConfig, pyramid: Pyramid) -> tuple[float, ...]:
    """The strength at each scale, 0 where it is not guided. One number grows linearly from 0 at the first scale to
    `cfg` at the last (VAR); after `cfg_scales` scales it is 0. UserError when the settings do not fit the pyramid."""
    cfg, scales, guided = settings.cfg, len(pyramid), settings.cfg_scales
    if isinstance(cfg, tuple):
        return list_per_scale("cfg", cfg, scales)
    if guided > scales:
        raise UserError(f"cfg_scales is {guided}, but the model has {scales} scales: give 1 to {scales}, or 0 for all")
    return tuple(cfg * pyramid.progress(k) if k < (guided or scales) else 0.0 for k in range(scales))


def count_sequences(strengths: Sequence[float]) -> tuple[int, ...]:
    """How many sequences the model runs for an image at each scale: 2 up to the last guided scale, then 1.

    A coarse scale of strength 0 before a guided one needs both: later scales attend to it.
    """
    last = max((k for k, strength in enumerate(strengths) if strength > 0), default=-1)
    return tuple(2 if k <= last else 1 for k in range(len(strengths)))
