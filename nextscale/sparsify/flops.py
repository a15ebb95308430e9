"""FLOPs that a pass with dynamic experts executed, from its records.

Counted as in `nextscale.info`: matrix products only, 1 multiply-add = 2 FLOPs. Routers count where they ran. The
oracle's computation of the true norms does not count. tests/test_dynamic_flops.py compares with torch's
FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Sequence

from nextscale.config.model import ModelConfig
from nextscale.info import condition_flops, scale_flops
from nextscale.transformer.feed_forward.records import Activity


def count_step_flops(config: ModelConfig, k: int, activities: Sequence[Activity], sequences: int) -> int:
    """FLOPs of scale k, given the activity of each block; `sequences`: two for an image with guidance."""
    model = config.transformer
    assert model is not None, "a tokenizer alone has no transformer to count"
    total, D, dynamic = sequences * scale_flops(config, k), model.width, model.dynamic
    for activity in activities:
        idle = sequences * config.pyramid.counts[k] * model.ffn_width - int(activity.units_BN.sum())
        router = D * dynamic.router_width + dynamic.router_width * dynamic.experts
        total += 2 * (int(activity.routed_BN.sum()) * router - 2 * D * idle)
    return total


def select_scale(activity: Activity, span: tuple[int, int]) -> Activity:
    """The activity of one scale, whose positions are `span`, in that of a teacher-forced pass."""
    start, end = span
    return Activity(activity.units_BN[:, start:end], activity.routed_BN[:, start:end])


def count_dense_flops(config: ModelConfig, sequences: int) -> int:
    """FLOPs of all scales and of the condition, with all experts; `sequences`: two for an image with guidance."""
    assert config.transformer is not None, "a tokenizer alone has no transformer to count"
    scales = sum(scale_flops(config, k) for k in range(len(config.pyramid)))
    return sequences * (condition_flops(config.transformer) + scales)
