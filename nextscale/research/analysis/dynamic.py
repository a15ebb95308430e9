"""Dynamic experts during sampling: executed FLOPs, maps of experts per token, and sample images.

Letters: B images, N tokens of a scale, K scales, h w sides of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.pictures import save_image, tile_images, to_pil
from nextscale.config.analysis import DynamicAnalysisConfig
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.flops import count_sampled_flops
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.analyzed_model import name_scales
from nextscale.research.analysis.figures import plot_map_grids
from nextscale.transformer.feed_forward import collect


def find_threshold(
    pipeline: Pipeline, labels: Sequence[int | None], base: SampleConfig, scales: int, target: float, rounds: int = 10
) -> float:
    """The threshold at which sampling executes the share `target` of the dense FLOPs, found by bisection.

    It is used at the last `scales` scales; `scales` 1 means all sparse scales.
    """
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        share = count_sampled_flops(pipeline, labels, replace(base, tau=(middle,) * scales), 32).share
        low, high = (middle, high) if share < target else (low, middle)
    return low


@dataclass(frozen=True)
class ExpertMaps:
    """One image during sampling, at each sparse scale."""

    scales: list[str]
    maps: list[list[list[float]]]
    """h x w: the share of the experts that ran for each token, mean over blocks and branches of guidance."""
    pictures: list[Image.Image]
    """The canvas so far, decoded."""


def map_experts(
    pipeline: Pipeline, given: Mapping[str, Any], settings: SampleConfig, first_image: int = 0
) -> ExpertMaps:
    """Sample one image, and map how many experts each token used. UserError for a model without experts.

    `given`: keywords of `Pipeline.sample`, such as `labels` or `prompts`, for one image.
    """
    _require_experts(pipeline)
    result = ExpertMaps([], [], [])
    pyramid, width = pipeline.config.pyramid, pipeline.transformer.config.ffn_width
    names = name_scales(pyramid)
    for step in pipeline.sample_scales(config=settings, first_image=first_image, **given):
        activities = collect(step.records, "activity")
        if not activities:
            continue
        share_N = torch.stack([activity.share_BN(width).mean(dim=0) for activity in activities]).mean(dim=0)
        if bool((share_N == share_N[0]).all()) and not activities[0].routed_BN.any():
            continue
        result.scales.append(names[step.k])
        result.maps.append(share_N.view(pyramid.sides[step.k]).tolist())
        result.pictures.append(to_pil((pipeline.tokenizer.decode_canvas(step.canvas_BChw) + 1) / 2)[0])
    if not result.maps:
        raise UserError("with these settings no scale is sparse: give a tau below 1")
    return result


def _require_experts(pipeline: Pipeline) -> None:
    if not pipeline.transformer.config.dynamic.experts:
        raise UserError("this model has no dynamic experts: make one with `nextscale sparsify`")


def analyse_dynamic(source: str, out: Path, shown: DynamicAnalysisConfig, settings: SampleConfig) -> dict[str, Any]:
    """Write experts.png, samples.png and dynamic.json of a model with dynamic experts into `out`.

    experts.png: experts per token at every sparse scale, with several thresholds (DMoE-VAR, Fig. 12). samples.png:
    images of one seed, in a row for all experts and a row for each setting (Fig. 2a). dynamic.json: the FLOPs that each
    setting executed, averaged over the images.
    """
    pipeline = Pipeline.from_pretrained(source, device=shown.device)
    _require_experts(pipeline)
    classes = pipeline.transformer.config.condition.require_classes("this figure draws images")
    labels = [i % classes for i in range(shown.num)]
    sparse = {f"tau {tau:g}": replace(settings, tau=(tau,), budget=0.0) for tau in shown.taus}
    if settings.tau or settings.budget:
        sparse = {"as given": settings, **sparse}
    panels: dict[str, Any] = {}
    for name, setting in sparse.items():
        shares = map_experts(pipeline, {"labels": labels[:1]}, setting)
        panels[name] = (["experts"], shares.scales, [[share_hw] for share_hw in shares.maps], shares.pictures)
    pictures, captions, rows = list[Image.Image](), list[str](), list[dict[str, Any]]()
    for name, setting in {"all experts": replace(settings, tau=(1.0,), budget=0.0), **sparse}.items():
        images = pipeline.sample(labels[: shown.columns], setting)
        pictures += images.pil()
        captions += [name] * len(images.captions)
        executed = count_sampled_flops(pipeline, labels, setting, shown.batch_size)
        rows.append({"name": name, "tau": list(setting.tau), "budget": setting.budget, **executed.to_dict()})
    plot_map_grids(panels, "share of experts", out / "experts.png")
    save_image(tile_images(pictures, captions, columns=min(shown.columns, len(labels))), out / "samples.png")
    report = {"model": source, "images": len(labels), "rows": rows, "machine": describe_machine(pipeline.device)}
    write_json(out / "dynamic.json", report)
    return report
