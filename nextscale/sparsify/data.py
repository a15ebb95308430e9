"""Data for `nextscale sparsify`: a token cache, images, or samples of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.checkpoints.shards import Form, check_range, read_owner, read_shard, verify_shard, write_shard
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically
from nextscale.common.fingerprint import fingerprint_weights
from nextscale.common.inputs import RANDOM_NUMBER_GENERATOR, RANDOM_NUMBERS, discard_stale
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import SparsifyConfig
from nextscale.data.cache import is_token_cache
from nextscale.data.classes import Classes, open_matched_examples
from nextscale.data.datasets import split_rows
from nextscale.data.examples import Examples, MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.training.inputs import read_tokens

_HELD_OUT = 0.1
"""Share of the model's samples of every class that is held out."""
_REMEDY = "delete it and run the command again"
_SHARD_SIZE = 64
"""Samples in one file."""


@dataclass(frozen=True)
class Data:
    """Examples with a label and either tokens or an image."""

    name: str
    train: Examples
    held_out: Examples
    inputs: dict[str, Any]
    """What the examples are made of, see `nextscale.common.inputs`."""


def open_data(source: Path, checkpoint: Checkpoint, config: SparsifyConfig, samples: Path, world: World) -> Data:
    """The data that `config` names. Where it names none, the model in `source` draws samples into folder `samples`.

    Raises UserError when the data do not fit the model.
    """
    assert checkpoint.config.transformer is not None, "check_dense has been called"
    if not config.data:
        made_of = _draw_samples(source, checkpoint, config, samples, world)
        data = _load_samples(samples, config.samples, checkpoint.config, config.seed)
        return dataclasses.replace(data, inputs={"samples": made_of, **data.inputs})
    tokenizer = load_tokenizer(checkpoint, checkpoint.config)
    known = Classes.of_model(str(source), checkpoint.config)
    train, held_out, match = open_matched_examples(
        config.data, known, checkpoint.config, tokenizer, config.images, config.seed
    )
    if world.main:
        match.print_note()
    if not len(held_out):
        raise UserError(f"{config.data} holds out no images, on which thresholds are calibrated")
    inputs: dict[str, Any] = {"data": train.inputs}
    if not is_token_cache(Path(config.data)):
        inputs |= {"images": to_dict(config.images), "seed": config.seed}
    return Data(config.data, train, held_out, inputs)


def _draw_samples(
    source: Path, checkpoint: Checkpoint, config: SparsifyConfig, folder: Path, world: World
) -> dict[str, Any]:
    """Draw the samples that `folder` lacks, of the model's classes in turn, and return what they are made of.

    The first process draws for all. Samples of another model or with other settings are drawn again.
    """
    sampling = _select_all_experts(checkpoint, config.sampling)
    weights = fingerprint_weights(checkpoint.tokenizer | checkpoint.transformer, str(source))
    inputs = {
        "model": weights,
        "images": config.samples,
        "sampling": to_dict(sampling),
        RANDOM_NUMBERS: RANDOM_NUMBER_GENERATOR,
    }
    if world.main:
        discard_stale(folder / "samples.json", inputs, "samples-*.safetensors", "samples of the model")
        missing = [start for start in range(0, config.samples, _SHARD_SIZE) if not _shard_path(folder, start).exists()]
        if missing:
            pipeline = Pipeline.from_checkpoint(checkpoint, device=world.device).optimize()
            classes = pipeline.transformer.config.condition.require_classes("without --data sparsify draws images")
        for start in tqdm(missing, desc="drawing samples", unit="file"):
            labels = [i % classes for i in range(start, min(start + _SHARD_SIZE, config.samples))]
            images = pipeline.sample(labels, sampling, batch_size=config.batch_size, first_image=start)
            path = _shard_path(folder, start)
            with write_atomically(path) as (draft,):
                tensors = {"tokens": images.tokens.to(torch.int32), "label": torch.tensor(labels)}
                write_shard(draft, path, tensors, read_owner(folder / "samples.json"))
    world.wait()
    return inputs


def _select_all_experts(checkpoint: Checkpoint, sampling: SampleConfig) -> SampleConfig:
    """The settings of sampling with all experts, whatever thresholds the model has."""
    assert checkpoint.config.transformer is not None, "check_dense has been called"
    all_experts = (1.0,) if checkpoint.config.transformer.dynamic.experts else ()
    return dataclasses.replace(sampling, tau=all_experts, budget=0.0, selection="threshold")


def _load_samples(folder: Path, count: int, config: ModelConfig, seed: int = 0) -> Data:
    """The samples, of which a tenth of every class is held out."""
    assert config.transformer is not None, "check_dense has been called"
    owner, shards = read_owner(folder / "samples.json"), []
    stops = {"tokens": config.tokenizer.vocab_size, "label": config.transformer.condition.num_classes}
    for start in range(0, count, _SHARD_SIZE):
        path, rows = _shard_path(folder, start), min(_SHARD_SIZE, count - start)
        forms: dict[str, Form] = {
            "tokens": ([torch.int32], (rows, config.pyramid.length)),
            "label": ([torch.int64], (rows,)),
        }
        tensors = read_shard(path, owner, forms, _REMEDY)
        verify_shard(path, remedy=_REMEDY)
        check_range(path, tensors, stops, _REMEDY)
        shards.append(tensors)
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in ("tokens", "label")}
    parts = split_rows(tensors["label"], None, _HELD_OUT, seed)
    if not all(map(len, parts)):
        raise UserError(f"{count} samples are too few to hold some out: give --samples with two of each class or more")
    train, held_out = (MemoryExamples(**{name: tensor[part] for name, tensor in tensors.items()}) for part in parts)
    inputs = {"held_out": f"{_HELD_OUT} of every class, seed {seed}"}
    return Data(f"{count} samples of the model", train, held_out, inputs)


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"samples-{start:06d}.safetensors"


@torch.no_grad()
def load_token_batches(examples: Examples, pipeline: Pipeline, limit: int, size: int) -> list[tuple[Any, Tensor]]:
    """(condition values, tokens (B, L)) of the first `limit` examples, at most `size` a batch, on its device."""
    batches: list[tuple[Any, Tensor]] = []
    tokenizer, condition = pipeline.tokenizer, pipeline.transformer.condition
    count, device = min(len(examples), limit), tokenizer.quantizer.codebook.weight.device
    for start in range(0, count, size):
        batch = examples.fetch(range(start, min(start + size, count)), None)
        batch = {name: rows.to(device) for name, rows in batch.items() if isinstance(rows, Tensor)}
        batches.append((condition.from_batch(batch), read_tokens(batch, tokenizer)))
    return batches
