"""FLOPs that passes of a model with dynamic experts executed, from their records.

As `nextscale.info` counts: products alone, 1 multiply-add = 2 FLOPs. Routers count where they ran; the first pass of an
oracle, which computes the true norms, does not. tests/test_dynamic_flops.py compares with torch's
FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Sequence

from nextscale.config.model import ModelConfig
from nextscale.info import condition_flops, scale_flops
from nextscale.transformer.feed_forward.records import Activity


def count_step_flops(config: ModelConfig, k: int, activities: Sequence[Activity], sequences: int) -> int:
    """FLOPs of scale k for so many sequences (guidance makes two of an image), given the activity of each block."""
    model = config.transformer
    assert model is not None, "a tokenizer alone has no transformer to count"
    total, D, dynamic = sequences * scale_flops(config, k), model.width, model.dynamic
    for activity in activities:
        idle = sequences * config.pyramid.counts[k] * model.ffn_width - int(activity.units_BN.sum())
        router = D * dynamic.router_width + dynamic.router_width * dynamic.experts
        total += 2 * (int(activity.routed_BN.sum()) * router - 2 * D * idle)
    return total


def select_scale(activity: Activity, span: tuple[int, int]) -> Activity:
    """The part of a teacher-forced pass's activity that is of one scale."""
    parts = (activity.units_BN, activity.routed_BN)
    return Activity(*(part_BN[:, slice(*span)] for part_BN in parts))


def count_dense_flops(config: ModelConfig, sequences: int) -> int:
    """FLOPs of all scales for so many sequences with whole FFNs everywhere, and of the condition."""
    assert config.transformer is not None, "a tokenizer alone has no transformer to count"
    scales = sum(scale_flops(config, k) for k in range(len(config.pyramid)))
    return sequences * (condition_flops(config.transformer) + scales)
