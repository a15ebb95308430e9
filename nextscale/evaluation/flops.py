"""FLOPs that sampling executed, from the records of its passes: with guidance, pruning, experts and a refiner.

Counted as in `nextscale.info`: matrix products only, 1 multiply-add = 2 FLOPs. What depends on the tokens (which
dynamic experts and which experts of a mixture worked, how many tokens a block computed) is taken from the records, the
rest from the config. Routers count where they ran. The oracle's computation of the true norms does not count.
tests/test_dynamic_flops.py and tests/test_flops.py compare with torch's FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nextscale.common.registry import ROUTERS
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.info import condition_flops, depends_on_tokens, sample_flops, scale_flops
from nextscale.pipeline import Pipeline
from nextscale.sampling.guidance import count_sequences, schedule_parts
from nextscale.sampling.pruning import PruningPlan
from nextscale.sampling.sampler import ScaleStep
from nextscale.transformer.feed_forward import Record, collect
from nextscale.transformer.feed_forward.records import Activity
from nextscale.transformer.feed_forward.routers import Routing


def count_step_flops(
    config: ModelConfig, k: int, activities: Sequence[Activity], sequences: int, pruning: PruningPlan | None = None
) -> int:
    """FLOPs of scale k, given the activity of each block; `sequences`: two for an image with guidance."""
    return sequences * scale_flops(config, k, pruning) + _correct_for_activities(config, activities)


def count_pass_flops(
    config: ModelConfig, scales: range, records: Sequence[Record | None], sequences: int,
    pruning: PruningPlan | None = None,
) -> int:  # fmt: skip
    """FLOPs of a pass over these scales, of which the last one's logits are computed.

    Sampling passes one scale at a time; a refiner's first pass has all scales so far.
    """
    total = sequences * sum(scale_flops(config, j, pruning, head=j == scales[-1]) for j in scales)
    total += _correct_for_activities(config, collect(records, "activity"))
    return total + sum(_correct_for_routing(config, scales, routing) for routing in collect(records, "routing"))


def _correct_for_activities(config: ModelConfig, activities: Sequence[Activity]) -> int:
    """What dynamic experts cost more than all hidden units of the tokens computed: routers, less the idle units."""
    model = config.transformer
    assert model is not None, "a tokenizer alone has no transformer to count"
    total, D, dynamic = 0, model.width, model.dynamic
    for activity in activities:
        idle = activity.units_BN.numel() * model.ffn_width - int(activity.units_BN.sum())
        router = D * dynamic.router_width + dynamic.router_width * dynamic.experts
        total += 2 * (int(activity.routed_BN.sum()) * router - 2 * D * idle)
    return total


def _correct_for_routing(config: ModelConfig, scales: range, routing: Routing) -> int:
    """What a block's mixture of experts cost more than the config says: zero-computation experts take rows from FFNs,
    and a router of your own may select any number."""
    model = config.transformer
    assert model is not None, "a tokenizer alone has no transformer to count"
    router: Any = ROUTERS.get(model.experts.router)
    sequences, tokens, _ = routing.selected_BNM.shape
    counts = [tokens] if len(scales) == 1 else [config.pyramid.counts[j] for j in scales]
    expected = sequences * sum(router.count_expert_calls(model.experts, n) for n in counts)
    selected = int(routing.selected_BNM[..., : model.experts.count].sum())
    return 2 * 2 * model.width * model.ffn_width * (selected - expected)


def count_dense_flops(config: ModelConfig, settings: SampleConfig) -> int:
    """FLOPs of an image with all experts and all tokens, without a refiner, under the guidance of these settings."""
    return sample_flops(config, SampleConfig(cfg=settings.cfg, cfg_scales=settings.cfg_scales))


class FlopCounter:
    """The FLOPs of the transformers for one batch. Give it every step, in order."""

    def __init__(self, pipeline: Pipeline, settings: SampleConfig, images: int):
        self.config, self.refiner, self.settings = pipeline.config, pipeline.load_refiner(settings), settings
        per_image = count_sequences(*schedule_parts(settings, self.config.pyramid))
        self.sequences_K = [images * count for count in per_image]
        self.pruning = None
        if settings.prune:
            self.pruning = PruningPlan(self.config.pyramid, settings.prune, settings.prune_first_block)
        assert self.config.transformer is not None, "a generator has a transformer"
        self.flops = self.sequences_K[0] * condition_flops(self.config.transformer)

    def add(self, step: ScaleStep) -> None:
        """Count a step."""
        sequences = self.sequences_K[step.k]
        config, scales, switch = self.config, range(step.k, step.k + 1), self.settings.draft_scales
        if self.refiner is not None and step.k >= switch:
            config = replace(config, transformer=self.refiner.config)
            if step.k == switch:  # it takes in at once all that was drawn before
                scales = range(step.k + 1)
                self.flops += sequences * condition_flops(self.refiner.config)
        self.flops += count_pass_flops(config, scales, step.records, sequences, self.pruning)


@dataclass(frozen=True)
class ExecutedFlops:
    """What sampling cost the transformer; means over images."""

    flops: float
    """Of an image, with guidance and routers."""
    share: float
    """Over the FLOPs of the same model with all experts and all tokens, without a refiner, under equal guidance."""
    deviation: float
    """Standard deviation of the share over batches; 0 for one batch."""
    active_K: tuple[float, ...]
    """Share of the FFNs' hidden units that ran, per scale."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "flops": self.flops, "share": self.share, "deviation": self.deviation,
            "active_per_scale": list(self.active_K),
        }  # fmt: skip


@torch.no_grad()
def count_sampled_flops(
    pipeline: Pipeline, labels: Sequence[int | None], settings: SampleConfig, batch_size: int = 16
) -> ExecutedFlops:
    """Sample images of these labels, and count the FLOPs that were executed from the records of every scale."""
    config, model = pipeline.config, pipeline.transformer.config
    flops, sizes, active = list[int](), list[int](), list[torch.Tensor]()
    for start in range(0, len(labels), batch_size):
        batch = list(labels[start : start + batch_size])
        counter = FlopCounter(pipeline, settings, len(batch))
        share_K = torch.ones(len(config.pyramid), dtype=torch.float64)
        for step in pipeline.sample_scales(batch, settings, first_image=start):
            counter.add(step)
            shares = [activity.share_BN(model.ffn_width).mean() for activity in collect(step.records, "activity")]
            if shares:
                share_K[step.k] = torch.stack(shares).mean()
        flops.append(counter.flops)
        sizes.append(len(batch))
        active.append(share_K * len(batch))
    dense = count_dense_flops(config, settings)
    per_batch = torch.tensor([f / n / dense for f, n in zip(flops, sizes, strict=True)], dtype=torch.float64)
    deviation = float(per_batch.std()) if len(per_batch) > 1 else 0.0
    mean = sum(flops) / len(labels)
    return ExecutedFlops(mean, mean / dense, deviation, tuple((torch.stack(active).sum(dim=0) / len(labels)).tolist()))


def count_planned_flops(config: ModelConfig, settings: SampleConfig, refiner: ModelConfig | None = None) -> int | None:
    """FLOPs of an image as the config and these settings decide them; None where they depend on the tokens."""
    models = [m.transformer for m in (config, refiner) if m is not None and m.transformer is not None]
    return None if any(map(depends_on_tokens, models)) else sample_flops(config, settings, refiner)
