"""What dynamic experts do while images are drawn: FLOPs that were executed, experts per token as maps, and pictures.

Letters: B images, N tokens of a scale, K scales, h w sides of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import describe_machine
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_image, tile_images, to_pil
from nextscale.config.analysis import DynamicShown
from nextscale.config.sampling import SampleConfig
from nextscale.info import condition_flops
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.figures import map_grids
from nextscale.research.analysis.subject import scale_names
from nextscale.sparsify.flops import count_dense_flops, count_step_flops
from nextscale.transformer.feed_forward.records import Activity, recorded


@dataclass(frozen=True)
class Executed:
    """What drawing images cost the transformer, on average."""

    flops: float
    """Of an image, guidance and routers counted."""
    share: float
    """Over those of the same model with all experts."""
    deviation: float
    """Standard deviation of the share over batches; 0 for one."""
    active_K: tuple[float, ...]
    """Share of the FFNs' hidden units that ran, per scale."""


@torch.no_grad()
def count_sampled_flops(
    pipeline: Pipeline, labels: Sequence[int | None], settings: SampleConfig, batch_size: int = 16
) -> Executed:
    """FLOPs that were executed while images of these labels were drawn, read off the records of every scale."""
    if settings.prune or settings.draft_scales:
        raise UserError("FLOPs of dynamic experts are counted without prune and refiner: leave those settings out")
    config, totals, units = pipeline.config, list[tuple[int, int]](), list[Tensor]()
    model = pipeline.transformer.config
    branches = 2 if settings.guided else 1
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        sequences = branches * len(part)
        total = sequences * condition_flops(model)
        run = torch.ones(len(config.pyramid), dtype=torch.float64)
        for step in pipeline.sample_scales(list(part), settings, first_image=start):
            total += count_step_flops(config, step.k, step.records, sequences)
            found = [a.share_BN(model.ffn_width).mean() for a in recorded(step.records, Activity)]
            run[step.k] = torch.stack(found).mean() if found else 1.0
        totals.append((total, len(part)))
        units.append(run * len(part))
    dense = count_dense_flops(config, branches)
    shares = torch.tensor([total / n / dense for total, n in totals], dtype=torch.float64)
    flops = sum(total for total, _ in totals) / len(labels)
    active = torch.stack(units).sum(dim=0) / len(labels)
    deviation = float(shares.std()) if len(shares) > 1 else 0.0
    return Executed(flops, flops / dense, deviation, tuple(active.tolist()))


def find_threshold(
    pipeline: Pipeline, labels: Sequence[int | None], base: SampleConfig, scales: int, target: float, rounds: int = 10
) -> float:
    """The threshold at which sampling executes this share of the dense FLOPs, by bisection: for comparisons at equal
    FLOPs. It is that of the last `scales` scales; with 1, of all sparse scales."""
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        share = count_sampled_flops(pipeline, labels, replace(base, tau=(middle,) * scales), 32).share
        low, high = (middle, high) if share < target else (low, middle)
    return low


def expert_maps(pipeline: Pipeline, label: int | None, settings: SampleConfig, first_image: int = 0) -> dict[str, Any]:
    """One image as it is drawn: at each sparse scale the picture so far and how many experts each token used.

    Means over blocks and over the two branches of guidance, as shares of all experts. UserError for a model without
    experts.
    """
    _need_experts(pipeline)
    scales, maps, pictures = [], [], []
    names = scale_names(pipeline.config.pyramid)
    for step in pipeline.sample_scales([label], settings, first_image=first_image):
        found = recorded(step.records, Activity)
        if not found:
            continue
        width = pipeline.transformer.config.ffn_width
        share_N = torch.stack([a.share_BN(width).mean(dim=0) for a in found]).mean(dim=0)
        if bool((share_N == share_N[0]).all()) and not found[0].routed_BN.any():
            continue
        share_hw = share_N.view(pipeline.config.pyramid.sides[step.k])
        scales.append(names[step.k])
        maps.append(share_hw.tolist())
        pictures.append(to_pil((pipeline.tokenizer.paint(step.canvas_BChw) + 1) / 2)[0])
    if not maps:
        raise UserError("with these settings no scale is sparse: give a tau below 1")
    return {"scales": scales, "maps": maps, "pictures": pictures}


def _need_experts(pipeline: Pipeline) -> None:
    if not pipeline.transformer.config.dynamic.experts:
        raise UserError("this model has no dynamic experts: make one with `nextscale sparsify`")


def analyse_dynamic(source: str, out: Path, shown: DynamicShown, settings: SampleConfig) -> dict[str, Any]:
    """Draw experts.png and samples.png of a model with dynamic experts into `out`, and dynamic.json beside them.

    experts.png: experts per token at every sparse scale, at several thresholds (DMoE-VAR, Fig. 12).
    samples.png: rows of images of one seed, with all experts and with each setting (Fig. 2a). dynamic.json: the FLOPs
    that each setting executed, averaged over the images.
    """
    pipeline = Pipeline.from_pretrained(source, device=shown.device)
    _need_experts(pipeline)
    classes = pipeline.transformer.config.condition.num_classes
    labels = [i % classes for i in range(shown.num)]
    given = {f"tau {tau:g}": replace(settings, tau=(tau,), budget=0.0) for tau in shown.taus}
    if settings.tau or settings.budget:
        given = {"as given": settings, **given}
    panels, rows, report = {}, [("all experts", replace(settings, tau=(1.0,), budget=0.0))], []
    for name, setting in given.items():
        maps = expert_maps(pipeline, labels[0], setting)
        panels[name] = (["experts"], maps["scales"], [[m] for m in maps["maps"]], maps["pictures"])
        rows.append((name, setting))
    pictures, captions = [], []
    for name, setting in rows:
        images = pipeline.sample(labels[: shown.columns], setting)
        pictures += images.pil()
        captions += [name] * len(images.captions)
        executed = count_sampled_flops(pipeline, labels, setting, shown.batch_size)
        report.append({
            "name": name, "tau": list(setting.tau), "budget": setting.budget, "flops": executed.flops,
            "share": executed.share, "deviation": executed.deviation, "active_per_scale": list(executed.active_K),
        })  # fmt: skip
    map_grids(panels, "share of experts", out / "experts.png")
    save_image(tile_images(pictures, captions, columns=min(shown.columns, len(labels))), out / "samples.png")
    found = {"model": source, "images": len(labels), "rows": report, "machine": describe_machine(pipeline.device)}
    write_json(out / "dynamic.json", found)
    return found
