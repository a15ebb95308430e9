"""How images become tokens: the tokens of each scale, what they add to the canvas, and what is left to encode.

Letters: B images, L tokens of all scales, K scales, V codes, c code width, h w sides of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.pictures import to_pil
from nextscale.common.plots import COLOUR_MAP
from nextscale.config.data import ReadConfig
from nextscale.data.files import load_named_images
from nextscale.evaluation.metrics.reconstruction import psnr
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.analyzed_model import name_scales
from nextscale.research.analysis.features import project_principal
from nextscale.research.analysis.figures import Row, plot_image_rows


@torch.no_grad()
def analyse_pyramid(
    model: str, images: Sequence[Path], out: Path, *, num: int = 1, device: str = "auto",
    reading: ReadConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The first `num` images, scale by scale; writes pyramid.json and pyramid.png into `out`.

    `model`: a checkpoint with a tokenizer. For each scale of an image the report has its tokens, the PSNR (dB) of the
    image decoded from the scales so far, and the share of the features' sum of squares that is left to encode. Returns
    the content of pyramid.json. Raises UserError for images that cannot be read.
    """
    pipeline = Pipeline.from_pretrained(model, device=device)
    named = load_named_images(images, pipeline.config.image_size, reading)
    pyramid, tokenizer = pipeline.config.pyramid, pipeline.tokenizer
    colours_V3, panels, reports = _colour_codes(tokenizer.quantizer.codebook.weight), {}, []
    for name, image in list(zip(named.names, named.images, strict=True))[:num]:
        (tokens_L,) = pipeline.encode(image)
        x_1 = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(pipeline.device) / 127.5 - 1
        features = tokenizer.extract_features(x_1)
        canvases = torch.cat(list(tokenizer.build_canvases(tokens_L[None])))  # (K, c, h, w)
        decoded = torch.cat([(tokenizer.decode_canvas(canvas[None]) + 1) / 2 for canvas in canvases])
        maps = [tokens_L[i:j].reshape(side) for (i, j), side in zip(pyramid.spans, pyramid.sides, strict=True)]
        left = (features - canvases).square()
        reports.append(
            {
                "image": name,
                "tokens": [tokens.tolist() for tokens in maps],
                "psnr_db": psnr(decoded, (x_1 + 1).div(2).clamp(0, 1).expand_as(decoded)).tolist(),
                "left": (left.sum(dim=(1, 2, 3)) / features.square().sum()).tolist(),
            }
        )
        added = canvases.diff(dim=0, prepend=torch.zeros_like(canvases[:1]))
        norms = torch.cat([added.norm(dim=1), left.sum(dim=1).sqrt()])  # (2 K, h, w), on one scale of colours
        rows: list[Row] = [
            ("image so far", [*to_pil(decoded), image], None),
            ("tokens", [to_pil(colours_V3[tokens.cpu()].permute(2, 0, 1)[None])[0] for tokens in maps], None),
            ("added to the canvas", _colour_maps(norms)[: len(pyramid)], None),
            ("left to encode", _colour_maps(norms)[len(pyramid) :], None),
        ]
        panels[Path(name).name] = ([*name_scales(pyramid), "image"], rows)
    report = {
        "analysis": "pyramid",
        "model": model,
        "scales": name_scales(pyramid),
        "machine": describe_machine(pipeline.device),
        "images": reports,
    }
    write_json(out / "pyramid.json", report)
    plot_image_rows(panels, out / "pyramid.png")
    return report


def _colour_codes(codebook_VC: Tensor) -> Tensor:
    """A colour for each code (V, 3) in 0 to 1: its ranks on the codebook's three principal axes, so that similar codes
    have similar colours."""
    points_V3, _ = project_principal(codebook_VC.double().cpu(), axes=3)
    ranks_V3 = points_V3.argsort(dim=0).argsort(dim=0).float()
    return ranks_V3 / max(len(ranks_V3) - 1, 1)


def _colour_maps(values_Khw: Tensor) -> list[Image.Image]:
    """Maps as pictures, dark for 0 and bright for the largest value of all."""
    import matplotlib

    shares = (values_Khw / values_Khw.max().clamp_min(1e-30)).cpu().numpy()
    return [Image.fromarray((pixels[..., :3] * 255).round().astype(np.uint8)) for pixels in
            matplotlib.colormaps[COLOUR_MAP](shares)]  # fmt: skip
