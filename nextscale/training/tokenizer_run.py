"""`nextscale tokenizer train` and `nextscale tokenizer evaluate`, end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.backends import optimize
from nextscale.checkpoints.checkpoint import Checkpoint, build_modules, load_tokenizer
from nextscale.checkpoints.native import read_checkpoint, write_checkpoint
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.pictures import save_grid
from nextscale.common.plots import plot_curves
from nextscale.common.rng import fold_seed
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.tokenizer_training import TokenizerRunConfig, derive_pyramid
from nextscale.data.datasets import load_images
from nextscale.data.examples import Examples
from nextscale.evaluation.metrics.codebook import CodebookUsage
from nextscale.evaluation.metrics.reconstruction import psnr, ssim
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit
from nextscale.training.engine.log import Values, read_log
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.open_run import open_run
from nextscale.training.tokenizer_task import TokenizerTask

_BATCH, _SHOWN, _QUICK = 100, 8, 500


def train_tokenizer(
    config: TokenizerRunConfig, data: str, folder: Path, world: World | None = None, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a tokenizer on `data` into `folder`, a checkpoint of a tokenizer alone; return its final evaluation.

    Beside the checkpoint: best/ (the one with the highest held-out PSNR), reconstructions.png (renewed at every save),
    curves.png, evaluation.json, log.jsonl. Called again with the same folder it goes on where it stopped. Raises
    UserError and train.loop.Interrupted as `fit` does, and UserError naming what differs from an earlier run's
    settings, unless `accept_changes`.
    """
    world = world or World()
    settings = {"data": data, **to_dict(config)}
    start = read_checkpoint(Path(config.start)) if config.start else None
    codes = start.config.tokenizer if start else config.tokenizer
    model = ModelConfig(_pyramid(config, start), codes, None)
    examples, held_out, _ = open_run(
        folder, settings, model.square_side, config.images, config.train.seed, world,
        accept_changes=accept_changes, about=model.summary(),
    )  # fmt: skip
    tokenizer = load_tokenizer(start, model) if start else _new_tokenizer(model, config.train.seed)
    task = TokenizerTask(tokenizer, examples, config.losses, config.codebook)
    callbacks = _Callbacks(model, task, held_out, folder, world)
    train(
        task, config.train, folder, callbacks, world=world, settings=settings,
        accept_changes=True,  # they were compared with run.json, which may be newer than the last state
        max_unreadable=config.images.max_unreadable,
    )  # fmt: skip
    if not world.main:
        return {}
    report = evaluate_tokenizer(tokenizer, held_out)
    write_json(folder / "evaluation.json", report)
    draw_curves(folder)
    return report


class _Callbacks(Callbacks):
    """What happens at a save: a look at held-out images, and the model files."""

    def __init__(self, model: ModelConfig, task: TokenizerTask, held_out: Examples, folder: Path, world: World):
        self.model, self.task, self.held_out, self.folder, self.world = model, task, held_out, folder, world

    def validate(self, step: int) -> Values:
        if not self.world.main:
            return {}
        report = evaluate_tokenizer(self.task.tokenizer, self.held_out, _QUICK)
        values: Values = {name: report[name] for name in ("psnr_db", "perplexity", "usage")}
        return values | {"revived": int(self.task.learner.revived), "validation_loss": -report["psnr_db"]}

    def save_model(self, step: int, best: bool) -> None:
        if not self.world.main:
            return
        checkpoint = Checkpoint(self.model, dict(self.task.tokenizer.state_dict()), {})
        for folder in (self.folder, self.folder / "best") if best else (self.folder,):
            write_checkpoint(folder, checkpoint)
        show_reconstructions(self.task.tokenizer, self.held_out, self.folder / "reconstructions.png")


def _pyramid(config: TokenizerRunConfig, start: Checkpoint | None) -> Pyramid:
    """The start checkpoint's where nothing else is asked for, else as the config says."""
    if start is None:
        return derive_pyramid(config.image_size or 32, config.tokenizer.downsampling, config.scales)
    side = start.config.square_side
    if not config.scales and config.image_size in (0, side):
        return start.config.pyramid
    return derive_pyramid(config.image_size or side, start.config.tokenizer.downsampling, config.scales)


def _new_tokenizer(model: ModelConfig, seed: int) -> Tokenizer:
    """A fresh tokenizer from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "tokenizer"))
        return build_modules(model)[0]


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, examples: Examples, limit: int = 10**9) -> dict[str, Any]:
    """PSNR and SSIM (means of per-image values), codebook usage and perplexity, over all scales and per scale."""
    use = CodebookUsage.empty(tokenizer.pyramid, tokenizer.config.vocab_size)
    noise, similarity, count = [], [], min(len(examples), limit)
    starts = range(0, count, _BATCH)
    for start in tqdm(starts, desc="evaluating", unit="batch", disable=len(starts) < 20):
        part = examples.fetch(range(start, min(start + _BATCH, count)), None)["image"]
        real = scale_to_unit(part).to(tokenizer.quantizer.codebook.weight.device)
        tokens = tokenizer.encode(real)
        use.add(tokens, tokenizer.pyramid)
        pair = (tokenizer.decode(tokens) + 1) / 2, (real + 1) / 2
        noise.append(psnr(*pair))
        if min(real.shape[-2:]) >= 11:
            similarity.append(ssim(*pair))
    report: dict[str, Any] = {"images": count, "psnr_db": float(torch.cat(noise).mean())}
    if similarity:
        report["ssim"] = float(torch.cat(similarity).mean())
    return report | use.report() | {"scales": str(tokenizer.pyramid)}


@torch.no_grad()
def show_reconstructions(tokenizer: Tokenizer, examples: Examples, path: Path) -> None:
    """A picture: some images, and below each what the scales up to k give, coarse to fine."""
    images = examples.fetch(range(min(len(examples), _SHOWN)), None)["image"]
    real = scale_to_unit(images).to(tokenizer.quantizer.codebook.weight.device)
    rows: list[Tensor] = [real]
    rows += [tokenizer.decode_canvas(canvas) for canvas in tokenizer.build_canvases(tokenizer.encode(real))]
    names = ["image"] + [f"to {h}x{w}" for h, w in tokenizer.pyramid.sides]
    captions = [name for name in names for _ in range(len(real))]
    save_grid((torch.cat(rows).cpu() + 1) / 2, captions, path, columns=len(real))


def draw_curves(folder: Path) -> None:
    """How loss, PSNR, perplexity and usage went over training."""
    log = read_log(folder / "log.jsonl")
    panels = {}
    for name in ("loss", "psnr_db", "perplexity", "usage"):
        panels[name] = {name: [(r["step"], r[name]) for r in log if name in r]}
    plot_curves(panels, folder / "curves.png")


def evaluate_folder(folder: Path, data: str, limit: int, out: Path | None) -> dict[str, Any]:
    """Evaluate the tokenizer of a checkpoint folder on a data set; write report.json and the picture to `out`."""
    checkpoint = read_checkpoint(folder)
    model = dataclasses.replace(checkpoint.config, transformer=None, class_names=())
    tokenizer = load_tokenizer(checkpoint, model).eval()
    optimize(tokenizer)
    images = load_images(data, model.square_side, limit)
    images.print_notes()
    report = evaluate_tokenizer(tokenizer, images.to_examples())
    if out is not None:
        write_json(out / "report.json", report)
        show_reconstructions(tokenizer, images.to_examples(), out / "reconstructions.png")
    return report
