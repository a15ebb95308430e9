"""What `nextscale sparsify` trains and calibrates on: a token cache, images, or the model's own samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints.checkpoint import Checkpoint
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import record_settings, write_atomically
from nextscale.config.parse import to_dict
from nextscale.config.sparsify import SparsifyConfig
from nextscale.data.cache import TokenCache, is_token_cache
from nextscale.data.datasets import open_dataset
from nextscale.data.examples import Examples, MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.tokenizer import Tokenizer, to_unit

_HELD_OUT = 10
"""Every so many-th of the model's own samples is held out."""
_SHARD = 64


@dataclass(frozen=True)
class Data:
    """Examples with labels and tokens, or images."""

    name: str
    train: Examples
    held_out: Examples


def open_data(source: Path, checkpoint: Checkpoint, config: SparsifyConfig, samples: Path, world: World) -> Data:
    """The data that `config` names, or samples of the model in `source`, drawn into the folder `samples`.

    Raises UserError when model and data do not belong together.
    """
    assert checkpoint.config.transformer is not None, "a generator has a transformer"
    classes = checkpoint.config.transformer.condition.num_classes
    if not config.data:
        return _own_samples(source, checkpoint, config, samples, world)
    train: Examples
    held_out: Examples
    if is_token_cache(Path(config.data)):
        cache = TokenCache(Path(config.data))
        cache.check_tokenizer(Pipeline.from_checkpoint(checkpoint, dtype=torch.float32).tokenizer)
        train, held_out, found = cache.load_examples("train"), cache.load_examples("held_out"), len(cache.class_names)
    else:
        train, held_out, images = open_dataset(
            config.data, checkpoint.config.square_side, config.images, config.seed
        )  # fmt: skip
        found = len(images.class_names)
    if found != classes:
        raise UserError(f"{config.data} has {found} classes, the model {classes}: give data of the model's classes")
    if not len(held_out):
        raise UserError(f"{config.data} holds out no images, on which thresholds are calibrated")
    return Data(config.data, train, held_out)


def _own_samples(source: Path, checkpoint: Checkpoint, config: SparsifyConfig, folder: Path, world: World) -> Data:
    """Samples of the model, of its classes in turn, in files of `_SHARD` images: an interrupted drawing goes on."""
    model, count = checkpoint.config.transformer, config.samples
    assert model is not None, "a generator has a transformer"
    whole_ffns = (1.0,) if model.dynamic.experts else ()
    sampling = dataclasses.replace(config.sampling, tau=whole_ffns, budget=0.0, selection="threshold")
    if world.main:
        record_settings(folder / "samples.json", {"model": str(source), "images": count, "sampling": to_dict(sampling)})
        starts = [s for s in range(0, count, _SHARD) if not _shard(folder, s).exists()]
        pipeline = Pipeline.from_checkpoint(checkpoint, device=world.device).pack() if starts else None
        for start in tqdm(starts, desc="drawing samples", unit="file"):
            labels = [i % model.condition.num_classes for i in range(start, min(start + _SHARD, count))]
            assert pipeline is not None, "loaded where there is something to draw"
            images = pipeline.sample(labels, sampling, batch_size=config.batch_size, first_image=start)
            with write_atomically(_shard(folder, start)) as (draft,):
                save_file({"tokens": images.tokens.to(torch.int32), "label": torch.tensor(labels)}, draft)
    world.wait()
    parts = [load_file(_shard(folder, start)) for start in range(0, count, _SHARD)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("tokens", "label")}
    away = torch.arange(count) % _HELD_OUT == _HELD_OUT - 1
    if not away.any():
        raise UserError(f"{count} samples are too few to hold some out: give --samples {_HELD_OUT} or more")
    train, held_out = (MemoryExamples(**{n: t[rows] for n, t in whole.items()}) for rows in (~away, away))
    return Data(f"{count} samples of the model", train, held_out)


def _shard(folder: Path, start: int) -> Path:
    return folder / f"samples-{start:06d}.safetensors"


@torch.no_grad()
def batches_of(examples: Examples, tokenizer: Tokenizer, limit: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """(labels (B,), tokens (B, L)) of the first examples, at most `limit`, on the tokenizer's device."""
    found: list[tuple[Tensor, Tensor]] = []
    rows: Sequence[int] = range(min(len(examples), limit))
    device = tokenizer.quantizer.codebook.weight.device
    for start in range(0, len(rows), size):
        batch = examples.fetch(rows[start : start + size], None)
        if "tokens" in batch:
            tokens_BL = batch["tokens"].to(device).long()
        else:
            tokens_BL = tokenizer.encode(to_unit(batch["image"].to(device)))
        found.append((batch["label"].to(device), tokens_BL))
    return found
