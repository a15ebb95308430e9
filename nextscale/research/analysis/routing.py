"""Routing maps: how often each expert is chosen at each position of each scale's map (MEPA, Fig. 4).

Letters: B images, L tokens of all scales, M experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nextscale.common.files import write_json
from nextscale.common.pictures import to_pil
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.figures import map_grids
from nextscale.research.analysis.subject import Subject, about, subjects
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

    `block`: counted from 1; 0 = the last but one, as in Fig. 4. `image`: the number of one held-out image whose maps
    are wanted alone, beside what is painted of it up to each scale. Returns what routing.json holds. Raises UserError
    for a dense model, a block or an image that is not there, or data that is not the model's.
    """
    config = config or AnalysisConfig()
    head = about(data, config, torch.device(config.device))
    return write_routing(subjects(models, names, data, config), head, out, block=block, image=image)


def write_routing(
    found: Iterable[Subject], head: dict[str, Any], out: Path, *, block: int = 0, image: int | None = None
) -> dict[str, Any]:
    """`analyse_routing` of subjects at hand; `head`: what the report says of how it was made."""
    reports, pictures = [], {}
    for subject in found:
        experts, number = subject.experts(), subject.block(block, len(subject.model.blocks) - 1)
        if image is not None:
            subject = subject.alone(image)
        reports.append(_report(subject, number, experts))
        painted = _painted(subject) if image is not None else []
        pictures[f"{subject.name}, block {number}"] = (experts, subject.scales, reports[-1]["maps"], painted)
    one = {} if image is None else {"image": image}
    report = {"analysis": "routing", **head, **one, "models": reports}
    write_json(out / "routing.json", report)
    unit = "share of images that choose the expert" if image is None else "chosen (1) or not (0)"
    map_grids(pictures, unit, out / "routing.png")
    return report


def shares(subject: Subject, block: int) -> Tensor:
    """Share of the images that chose each expert at each position, float64 (L, M), on the CPU."""
    total: Tensor | int = 0
    for output in subject.outputs():
        total = total + collect(output.records, "routing")[block - 1].selected_BNM.sum(dim=0)
    assert isinstance(total, Tensor), "a subject has at least one image"
    return total.cpu().double() / len(subject.rows)


@torch.no_grad()
def _painted(subject: Subject) -> list[Image.Image]:
    """What is painted of the subject's one image up to each scale."""
    tokenizer = subject.pipeline.tokenizer
    _, tokens_1L = subject.tokens(subject.rows)
    return to_pil(
        torch.cat([(tokenizer.decode_canvas(canvas) + 1) / 2 for canvas in tokenizer.build_canvases(tokens_1L)])
    )


def _report(subject: Subject, block: int, experts: list[str]) -> dict[str, Any]:
    """A model's maps as JSON values; the variance of a choice (0 or 1) at a scale, mean over experts, is split into
    what differs between positions and what differs between images at the same position."""
    pyramid, share_LM = subject.model.pyramid, shares(subject, block)
    parts = [share_LM[start:end] for start, end in pyramid.spans]
    between = [part.var(dim=0, correction=0).mean() for part in parts]
    within = [(part * (1 - part)).mean() for part in parts]
    return {
        "name": subject.name,
        "router": subject.model.config.experts.router,
        "images": len(subject.rows),
        "block": block,
        "experts": experts,
        "scales": subject.scales,
        "share_per_scale": [part.mean(dim=0).tolist() for part in parts],
        "variance_between_positions": [float(v) for v in between],
        "variance_between_images": [float(v) for v in within],
        "maps": [part.T.unflatten(1, side).tolist() for part, side in zip(parts, pyramid.sides, strict=True)],
    }
