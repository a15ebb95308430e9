"""`nextscale tokenizer train` and `nextscale tokenizer evaluate`, end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints.checkpoint import Checkpoint, build_modules
from nextscale.checkpoints.native import read_checkpoint, write_checkpoint
from nextscale.config import ModelConfig, to_dict
from nextscale.data.datasets import ImageSet, load_images
from nextscale.errors import UserError
from nextscale.files import claim, write_json
from nextscale.metrics.codebook import CodebookUse
from nextscale.metrics.reconstruction import psnr, ssim
from nextscale.pictures import curves, grid
from nextscale.pyramid import Pyramid
from nextscale.rng import fold
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.train.log import read_log
from nextscale.train.loop import fit
from nextscale.train.tokenizer_config import TokenizerRunConfig, derive_pyramid
from nextscale.train.tokenizer_task import TokenizerTask, to_unit

_BATCH, _SHOWN, _QUICK = 100, 8, 500


def train_tokenizer(config: TokenizerRunConfig, data: str, folder: Path) -> dict[str, Any]:
    """Train a tokenizer on `data` into `folder`, a checkpoint of a tokenizer alone; return its final evaluation.

    Beside the checkpoint: reconstructions.png (renewed at every save), curves.png, evaluation.json, log.jsonl. Called
    again with the same folder it goes on where it stopped. Raises UserError and train.loop.Interrupted as `fit` does.
    """
    start = read_checkpoint(Path(config.start)) if config.start else None
    codes = start.config.tokenizer if start else config.tokenizer
    model = ModelConfig(_pyramid(config, start), codes, None)
    images = load_images(data, _square_side(model), config.limit, config.train.seed)
    images.say_remarks()
    train, held_out = images.split(config.held_out, config.train.seed)
    if len(held_out) == 0 or len(train) == 0:
        raise UserError(f"{data} has too few images for held_out={config.held_out}: one part would be empty")
    claim(folder / "run.json", {"data": data, **to_dict(config)})
    print(f"{data}: {len(train)} images to train on, {len(held_out)} held out; {model.summary()}")
    tokenizer = _new_tokenizer(model, config.train.seed, start)
    task = TokenizerTask(tokenizer, train.images_B3HW, config.losses, config.codebook)

    def save_and_look(step: int) -> dict[str, float]:
        write_checkpoint(folder, Checkpoint(model, dict(tokenizer.state_dict()), {}))
        show_reconstructions(tokenizer, held_out, folder / "reconstructions.png")
        report = evaluate_tokenizer(tokenizer, held_out.subset(torch.arange(min(len(held_out), _QUICK))))
        return {name: report[name] for name in ("psnr_db", "perplexity", "usage")} | {
            "revived": int(task.learner.revived)
        }

    fit(task, config.train, folder, save_and_look)
    save_and_look(config.train.steps)
    report = evaluate_tokenizer(tokenizer, held_out)
    write_json(folder / "evaluation.json", report)
    draw_curves(folder)
    return report


def _pyramid(config: TokenizerRunConfig, start: Checkpoint | None) -> Pyramid:
    """The start checkpoint's where nothing else is asked for, else as the config says."""
    if start is None:
        return derive_pyramid(config.image_size or 32, config.tokenizer.downsampling, config.scales)
    side = _square_side(start.config)
    if not config.scales and config.image_size in (0, side):
        return start.config.pyramid
    return derive_pyramid(config.image_size or side, start.config.tokenizer.downsampling, config.scales)


def _square_side(model: ModelConfig) -> int:
    """Side of the model's images in pixels; UserError when they are not square."""
    height, width = model.image_size
    if height != width:
        raise UserError(f"data sets are read as square images; this model wants {height} x {width}")
    return height


def _new_tokenizer(model: ModelConfig, seed: int, start: Checkpoint | None) -> Tokenizer:
    """A fresh tokenizer from the seed, or one with the weights of a checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, "tokenizer"))
        tokenizer, _ = build_modules(model)
    if start is not None:
        weights = {n: t.float() for n, t in start.tokenizer.items() if n != "quantizer.usage_KV"}
        tokenizer.load_state_dict(weights, strict=False)
    return tokenizer


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, data: ImageSet) -> dict[str, Any]:
    """PSNR and SSIM (means of per-image values), codebook usage and perplexity, over all scales and per scale."""
    use = CodebookUse.empty(tokenizer.pyramid, tokenizer.config.vocab_size)
    noise, similarity = [], []
    for part in data.images_B3HW.split(_BATCH):
        real = to_unit(part)
        tokens = tokenizer.encode(real)
        use.add(tokens, tokenizer.pyramid)
        pair = (tokenizer.decode(tokens) + 1) / 2, (real + 1) / 2
        noise.append(psnr(*pair))
        if min(real.shape[-2:]) >= 11:
            similarity.append(ssim(*pair))
    report: dict[str, Any] = {"images": len(data), "psnr_db": float(torch.cat(noise).mean())}
    if similarity:
        report["ssim"] = float(torch.cat(similarity).mean())
    return report | use.report() | {"scales": str(tokenizer.pyramid)}


@torch.no_grad()
def show_reconstructions(tokenizer: Tokenizer, data: ImageSet, path: Path) -> None:
    """A picture: some images, and below each what the scales up to k give, coarse to fine."""
    real = to_unit(data.images_B3HW[:_SHOWN])
    rows: list[Tensor] = [real]
    rows += [tokenizer.paint(canvas) for canvas in tokenizer.canvases(tokenizer.encode(real))]
    names = ["image"] + [f"to {h}x{w}" for h, w in tokenizer.pyramid.sides]
    captions = [name for name in names for _ in range(len(real))]
    grid((torch.cat(rows) + 1) / 2, captions, path, columns=len(real))


def draw_curves(folder: Path) -> None:
    """How loss, PSNR, perplexity and usage went over training."""
    log = read_log(folder / "log.jsonl")
    panels = {}
    for name in ("loss", "psnr_db", "perplexity", "usage"):
        panels[name] = {name: [(r["step"], r[name]) for r in log if name in r]}
    curves(panels, folder / "curves.png")


def evaluate_folder(folder: Path, data: str, limit: int, out: Path | None) -> dict[str, Any]:
    """Evaluate the tokenizer of a checkpoint folder on a data set; write report.json and the picture to `out`."""
    checkpoint = read_checkpoint(folder)
    model = dataclasses.replace(checkpoint.config, transformer=None, class_names=())
    tokenizer = _new_tokenizer(model, 0, checkpoint).eval()
    images = load_images(data, _square_side(model), limit, seed=0)
    images.say_remarks()
    report = evaluate_tokenizer(tokenizer, images)
    if out is not None:
        write_json(out / "report.json", report)
        show_reconstructions(tokenizer, images, out / "reconstructions.png")
    return report
