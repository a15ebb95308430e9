"""Check how well a model that reads control pictures keeps to them: edges, or a low resolution.

    python -m examples.control_check runs/edges --data cifar10-test.parquet --without models/var-cifar10 --out check

The control pictures are those of the data's images, with the images' classes. The same measure is taken of

    samples           images that the model draws from the control pictures
    other control     the samples, compared with the control picture of another image
    no control        images that the model draws from the classes alone
    without           with --without: those of a model that reads classes alone, with the same seed
    reconstructed     the data's images after the model's tokenizer: what can be kept at most

Edges: F1 of the edge pixels, exact and with a pixel counted as found where the other picture has one among its eight
neighbours or at its place. A low resolution: PSNR in dB of the means of 4 x 4 pixels. report.json has the figures,
control.png the control pictures with what was drawn from them and the images that they were computed from.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from examples.checking import add_sample_options, choose_settings, run_check
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_image, tile_images, to_pil, to_uint8
from nextscale.config.condition import ConditionConfig
from nextscale.evaluation.images import StoredImages
from nextscale.pipeline import Pipeline
from nextscale.transformer.conditions.picture import compute_control

SHOWN = 8
"""Images in the picture, a column each."""


def find_control(pipeline: Pipeline) -> ConditionConfig:
    """The part of the model's condition that is a control picture computed from images. UserError without one."""
    parts = pipeline.transformer.config.condition.list_parts()
    found = [part for part in parts.values() if part.kind == "picture" and part.control]
    if not found:
        raise UserError("the model reads no edges and no low resolution; `nextscale adapt --control` gives it some")
    return found[0]


def read_images(path: str, size: tuple[int, int], limit: int) -> tuple[Tensor, list[int]]:
    """At most `limit` images of a data set, of all classes: uint8 (B, 3, H, W), and their classes."""
    stored = StoredImages(path)
    stored = StoredImages(path, size, min(limit, stored.available))
    return stored.fetch(0, len(stored)), [int(stored.source.labels[i]) for i in stored.rows.tolist()]


def compare_edges(drawn_B1HW: Tensor, given_B1HW: Tensor) -> dict[str, float]:
    """F1 of edge pixels over all pictures, uint8 (B, 1, H, W), 0 or 255."""
    drawn, given = (x.float() / 255 for x in (drawn_B1HW, given_B1HW))
    scores = {}
    for name, reach in (("edges, F1", 0), ("edges within a pixel, F1", 1)):
        near_drawn, near_given = (F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach) for x in (drawn, given))
        precision = (drawn * near_given).sum() / drawn.sum().clamp(min=1)
        recall = (given * near_drawn).sum() / given.sum().clamp(min=1)
        scores[name] = float(2 * precision * recall / (precision + recall).clamp(min=1e-9))
    return scores


def compare_low_resolution(drawn_B3HW: Tensor, given_B3HW: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of low resolutions, uint8 (B, 3, H, W)."""
    error_B = (drawn_B3HW.double() - given_B3HW.double()).square().flatten(1).mean(dim=1)
    return {"low resolution, PSNR in dB": float((10 * (255**2 / error_B.clamp(min=1e-3)).log10()).mean())}


def measure(images_B3HW: Tensor, control_BCHW: Tensor, kind: str) -> dict[str, float]:
    """How well images, uint8 (B, 3, H, W), keep to control pictures."""
    compare = compare_edges if kind == "edges" else compare_low_resolution
    return compare(compute_control(images_B3HW, kind), control_BCHW)


def draw(pipeline: Pipeline, labels: list[int] | None, control: Tensor | None, options: argparse.Namespace) -> Tensor:
    """Samples, uint8 (B, 3, H, W); sample i has the same random numbers whatever it is drawn from."""
    settings = dataclasses.replace(choose_settings(pipeline, options), top_k=0)
    values: dict[str, Any] = {} if control is None else {"control": control.float() / 255}
    return to_uint8(pipeline.sample(labels, config=settings, batch_size=options.batch_size, **values).tensor)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The report; report.json and control.png are written into the folder `options.out`."""
    pipeline = Pipeline.from_pretrained(options.model, device=options.device)
    part = find_control(pipeline)
    images, labels = read_images(options.data, pipeline.config.image_size, options.limit)
    classes = labels if pipeline.config.count_of_classes else None
    control = compute_control(images, part.control)
    drawn = {"samples": draw(pipeline, classes, control, options)}
    if classes:
        drawn["no control"] = draw(pipeline, classes, None, options)
    if options.without:
        drawn["without"] = draw(Pipeline.from_pretrained(options.without, device=options.device), labels, None, options)
    drawn["reconstructed"] = to_uint8(pipeline.reconstruct(list(images.float() / 255)).tensor)
    figures = {name: measure(pictures, control, part.control) for name, pictures in drawn.items()}
    figures["other control"] = measure(drawn["samples"], control.roll(1, dims=0), part.control)
    report = {"model": options.model, "control": part.control, "images": len(images), "seed": options.seed}
    report["figures"] = figures
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "report.json", report)
    shown = [control.expand(-1, 3, -1, -1), *(drawn[name] for name in drawn if name != "reconstructed"), images]
    names = ["control", *(name for name in drawn if name != "reconstructed"), "image"]
    tiles = [picture for pictures in shown for picture in to_pil(pictures[:SHOWN].float() / 255)]
    captions = [name for name in names for _ in range(SHOWN)]
    save_image(tile_images(tiles, captions, columns=SHOWN), options.out / "control.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder of the model that reads control pictures")
    parser.add_argument("--data", required=True, help="labelled images, which the model was not trained on")
    parser.add_argument("--without", default="", help="model of the same classes without control pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.json and control.png")
    parser.add_argument("--limit", type=int, default=500, help="images to use at most")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    add_sample_options(parser)
    report = run_check(parser, check)
    for name, figures in report["figures"].items():
        print(f"{name:>14}", *(f"{figure} {value:.3f}" for figure, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()
