"""Classifier-free guidance, wrapped around a predictor.

Letters: B batch, N tokens of one scale, V codes, P guided parts of a condition, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig, list_per_scale
from nextscale.pyramid import Pyramid
from nextscale.sampling.sampler import Predictor
from nextscale.transformer.condition import Condition
from nextscale.transformer.var import Output


class GuidedPredictor:
    """Runs `predict` on the batch and its copies without condition at once, and combines the logits.

    After the last guided scale the copies are left out: no later scale needs them. `strengths_PK`: as `schedule_parts`
    gives them; `predict` must have been made for the values of `stack_copies`.
    """

    def __init__(self, predict: Predictor, strengths_PK: Sequence[Sequence[float]]):
        self.predict, self.strengths_PK, self.sequences_K = predict, strengths_PK, count_sequences(*strengths_PK)

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        if self.sequences_K[k] == 1:
            return self.predict(x_BNC, k)
        copies = 1 + len(self.strengths_PK)
        output = self.predict(None if x_BNC is None else x_BNC.repeat(copies, 1, 1), k)
        strengths = [strengths_K[k] for strengths_K in self.strengths_PK]
        return replace(output, logits_BNV=guide_by_parts(output.logits_BNV.chunk(copies), strengths))


def guide_logits(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: (1 + t) conditional - t unconditional."""
    return (1 + strength) * conditional - strength * unconditional


def guide_by_parts(copies: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Guidance of several parts of a condition, as InstructPix2Pix (arXiv 2211.09800, Eq. 3) guides by two.

    `copies`: logits with all parts, then without the last one, without the last two, ..., without any. Each part adds
    (1 + its strength) times what it changes, given the parts before it. One part: `guide_logits`.
    """
    total = guide_logits(copies[-2], copies[-1], strengths[0])
    for i in range(1, len(strengths)):
        total = total + (1 + strengths[i]) * (copies[-2 - i] - copies[-1 - i])
    return total


def stack_copies(condition: Condition, values: Any, parts: Sequence[str], negative: Any = None) -> Any:
    """The values of all sequences that guidance runs: those given, and those without parts of the condition.

    `parts`: guided ones, in the order of `guide_by_parts`; empty: the whole condition at once. `negative`: values that
    stand in place of "no condition", as many as `values`. UserError for parts that the condition does not have.
    """
    if not parts:
        return condition.add_unconditional(values) if negative is None else condition.join(values, negative)
    others = condition.nothing(len(values)) if negative is None else negative
    stacked = values
    for i in reversed(range(len(parts))):
        stacked = condition.join(stacked, condition.replace_parts(values, parts[i:], others))
    return stacked


def schedule_parts(settings: SampleConfig, pyramid: Pyramid) -> tuple[tuple[float, ...], ...]:
    """The strengths of guidance at each scale: one list of them; with `cfg_parts` one for each part, in its order."""
    if not settings.cfg_parts:
        return (schedule_guidance(settings, pyramid),)
    parts = [replace(settings, cfg=strength) for strength in settings.cfg_parts.values()]
    return tuple(schedule_guidance(part, pyramid) for part in parts)


def schedule_guidance(settings: SampleConfig, pyramid: Pyramid) -> tuple[float, ...]:
    """The strength at each scale, 0 where it is not guided. One number grows linearly from 0 at the first scale to
    `cfg` at the last (VAR); after `cfg_scales` scales it is 0. UserError when the settings do not fit the pyramid."""
    cfg, scales, guided = settings.cfg, len(pyramid), settings.cfg_scales
    if isinstance(cfg, tuple):
        return list_per_scale("cfg", cfg, scales)
    if guided > scales:
        raise UserError(f"cfg_scales is {guided}, but the model has {scales} scales: give 1 to {scales}, or 0 for all")
    return tuple(cfg * pyramid.progress(k) if k < (guided or scales) else 0.0 for k in range(scales))


def count_sequences(*strengths_PK: Sequence[float]) -> tuple[int, ...]:
    """How many sequences the model runs for an image at each scale: 1, and up to the last guided scale one more for
    each list of strengths.

    A coarse scale of strength 0 before a guided one needs both: later scales attend to it.
    """
    last = max(
        (k for strengths_K in strengths_PK for k, strength in enumerate(strengths_K) if strength > 0), default=-1
    )
    return tuple(1 + len(strengths_PK) if k <= last else 1 for k in range(len(strengths_PK[0])))
