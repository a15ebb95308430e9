"""A quickstart from few pictures: an adapter and new classes for a trained model, in place of models trained anew.

A model that is trained from nothing on a few dozen pictures learns them by heart. An adapter of a model that has seen
other pictures does not have to learn what pictures are; its training stops at the lowest held-out loss.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

import nextscale
from nextscale.checkpoints.native import read_config
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.distributed import World
from nextscale.config.data import DataConfig
from nextscale.config.files import read_settings
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.pipeline import Pipeline
from nextscale.training.transformer import train_transformer

ADAPTER = "adapter"
"""The folder of the adapter's run in that of the quickstart."""
_MODEL = Path("models") / "var-cifar10"


def find_start(config: QuickstartConfig, images: int) -> str:
    """The model that a quickstart with so many images starts from; empty where it trains its own.

    That of `config.start`, or with fewer than `config.few_images` images the one that comes with the repository, if the
    settings do not ask for another model, or for captions. Prints a note where it does not fit.
    """
    if (
        config.start
        or config.data == "digits"
        or config.captions
        or images >= config.few_images
        or not config.has_default_models
    ):
        return config.start
    folders = [folder / _MODEL for folder in (Path(), Path(nextscale.__file__).parents[1])]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    few = f"note: {images} images are few to train a model from nothing, which learns them by heart"
    if folder is None:
        print(f"{few}; give a trained model to start from with --start (this folder has no {_MODEL})")
        return ""
    found, wanted = read_config(folder)[0], config.geometry()
    if (found.image_size, found.pyramid) != wanted:
        (h, w), (height, width) = found.image_size, wanted[0]
        print(
            f"{few}; {folder} has images of {w}x{h} pixels in scales {found.pyramid}, and does not fit "
            f"{width}x{height} pixels in scales {wanted[1]}: give a model of this size with --start"
        )
        return ""
    print(f"{images} images are few: the quickstart starts from {folder} (--start) and trains an adapter of it")
    return str(folder)


def train_adapter(config: QuickstartConfig, start: str, folder: Path, world: World) -> Pipeline:
    """Train an adapter of `start` by the recipe lora into `folder`/adapter, and write the model with it to `folder`."""
    recipe = read_settings(RunConfig, Path("lora"))
    reading = {f.name: getattr(config.images, f.name) for f in dataclasses.fields(config.images)}
    run = dataclasses.replace(
        recipe,
        data=config.data,
        start=start,
        images=DataConfig(**reading, limit=config.limit, held_out=config.held_out),
        train=dataclasses.replace(recipe.train, seed=config.seed),
        sampling=config.sampling,
    )
    train_transformer(run, folder / ADAPTER, world)
    pipeline = Pipeline.from_pretrained(
        start, lora=[str(folder / ADAPTER)], device=world.device, dtype=torch.float32, backend="auto"
    )
    write_checkpoint(folder, pipeline.to_checkpoint())
    shutil.copyfile(folder / ADAPTER / "log.jsonl", folder / "log.jsonl")
    return pipeline
