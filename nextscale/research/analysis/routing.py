"""Routing maps: how often each expert is selected at each position of each scale's map (MEPA, Fig. 4).

Letters: B images, L tokens of all scales, M experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.files import write_json
from nextscale.common.pictures import to_pil
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.analyzed_model import AnalyzedModel, describe_analysis, open_models
from nextscale.research.analysis.figures import plot_map_grids
from nextscale.transformer.feed_forward import collect


def analyse_routing(
    models: Sequence[str],
    data: str,
    out: Path,
    config: AnalysisConfig | None = None,
    names: Sequence[str] = (),
    *,
    block: int = 0,
    image: int | None = None,
) -> dict[str, Any]:
    """Routing maps of a block on held-out images of `data`; writes routing.json and routing.png into `out`.

    `block`: counted from 1; 0 = the last but one, as in Fig. 4. `image`: the number of one held-out image; its maps are
    shown alone, next to the image decoded up to each scale. Returns the content of routing.json. Raises UserError for a
    dense model, for a block or an image that does not exist, or for data that is not the model's.
    """
    config = config or AnalysisConfig()
    head = describe_analysis(data, config, find_device(config.device))
    return write_routing_maps(open_models(models, names, data, config), head, out, block=block, image=image)


def write_routing_maps(
    models: Iterable[AnalyzedModel], head: dict[str, Any], out: Path, *, block: int = 0, image: int | None = None
) -> dict[str, Any]:
    """`analyse_routing` for models that are loaded already. `head`: see `describe_analysis`."""
    reports, panels = [], {}
    for analyzed in models:
        experts, number = analyzed.list_experts(), analyzed.check_block(block, len(analyzed.model.blocks) - 1)
        if image is not None:
            analyzed = analyzed.select_image(image)
        reports.append(_report_maps(analyzed, number, experts))
        pictures = _decode_scales(analyzed) if image is not None else []
        panels[f"{analyzed.name}, block {number}"] = (experts, analyzed.scales, reports[-1]["maps"], pictures)
    one_image = {} if image is None else {"image": image}
    report = {"analysis": "routing", **head, **one_image, "models": reports}
    write_json(out / "routing.json", report)
    unit = "share of images that choose the expert" if image is None else "chosen (1) or not (0)"
    plot_map_grids(panels, unit, out / "routing.png")
    return report


def compute_selection_shares(analyzed: AnalyzedModel, block: int) -> Tensor:
    """Share of the images that selected each expert at each position, float64 (L, M), on the CPU."""
    total: Tensor | int = 0
    for output in analyzed.run_batches():
        total = total + collect(output.records, "routing")[block - 1].selected_BNM.sum(dim=0)
    assert isinstance(total, Tensor), "an analysis has at least one image"
    return total.cpu().double() / len(analyzed.rows)


@torch.no_grad()
def _decode_scales(analyzed: AnalyzedModel) -> list[Image.Image]:
    """The single image of the analysis, decoded from the tokens up to each scale."""
    tokenizer = analyzed.pipeline.tokenizer
    _, tokens_1L = analyzed.load_tokens(analyzed.rows)
    canvases = tokenizer.build_canvases(tokens_1L)
    return to_pil(torch.cat([(tokenizer.decode_canvas(canvas) + 1) / 2 for canvas in canvases]))


def _report_maps(analyzed: AnalyzedModel, block: int, experts: list[str]) -> dict[str, Any]:
    """The maps of a model as JSON values.

    The variance of a selection (0 or 1) within a scale, averaged over experts, is split into the variance between
    positions and the variance between images at one position.
    """
    pyramid, share_LM = analyzed.model.pyramid, compute_selection_shares(analyzed, block)
    scale_shares = [share_LM[start:end] for start, end in pyramid.spans]
    between_positions = [share.var(dim=0, correction=0).mean() for share in scale_shares]
    between_images = [(share * (1 - share)).mean() for share in scale_shares]
    return {
        "name": analyzed.name,
        "router": analyzed.model.config.experts.router,
        "images": len(analyzed.rows),
        "block": block,
        "experts": experts,
        "scales": analyzed.scales,
        "share_per_scale": [share.mean(dim=0).tolist() for share in scale_shares],
        "variance_between_positions": [float(v) for v in between_positions],
        "variance_between_images": [float(v) for v in between_images],
        "maps": [share.T.unflatten(1, side).tolist() for share, side in zip(scale_shares, pyramid.sides, strict=True)],
    }
