"""A trained model and the held-out images on which it is analysed, teacher-forced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.common.errors import UserError
from nextscale.common.machine import describe_machine
from nextscale.config.analysis import AnalysisConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.data.classes import Classes, open_matched_examples
from nextscale.data.examples import Examples, check_unreadable
from nextscale.pipeline import Labels, Pipeline
from nextscale.pyramid import Pyramid
from nextscale.training.inputs import read_tokens
from nextscale.transformer.var import VAR, Output

_MIN_PROGRESS = 20
"""Batches from which on a progress bar is shown."""


@dataclass(frozen=True)
class AnalyzedModel:
    """A model, its name in the report, and the images on which it is analysed."""

    name: str
    pipeline: Pipeline
    held_out: Examples
    rows: range
    """The indices of the held-out images."""
    config: AnalysisConfig

    @property
    def model(self) -> VAR:
        return self.pipeline.transformer

    @property
    def scales(self) -> list[str]:
        """Names of the scales, height x width."""
        return name_scales(self.model.pyramid)

    def select_image(self, number: int) -> AnalyzedModel:
        """The model with one held-out image only; UserError when there is no image of this number."""
        if not 0 <= number < len(self.held_out):
            raise UserError(f"there is no image {number}: held-out images are numbered 0 to {len(self.held_out) - 1}")
        return replace(self, rows=range(number, number + 1))

    def load_tokens(self, rows: range) -> tuple[Any, Tensor]:
        """Values of the condition, such as labels (B,), and tokens (B, L), int64, of these held-out images, on the
        model's device."""
        batch = self.held_out.fetch(rows, None)
        check_unreadable(batch.get("unreadable", ()), len(self.rows), self.config.images.max_unreadable)
        device = self.pipeline.device
        batch = {name: values.to(device) if isinstance(values, Tensor) else values for name, values in batch.items()}
        return self.model.condition.from_batch(batch), read_tokens(batch, self.pipeline.tokenizer)

    def load_batches(self) -> Iterator[tuple[Any, Tensor]]:
        """`load_tokens` of each batch of images."""
        size = self.config.batch_size
        batches = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        for rows in tqdm(batches, desc=self.name, unit="batch", disable=len(batches) < _MIN_PROGRESS):
            yield self.load_tokens(rows)

    @torch.no_grad()
    def run_batches(self, hidden: int = 0) -> Iterator[Output]:
        """The model's output for each batch of images. `hidden`: `hidden_block` of `VAR.forward`."""
        for values, tokens_BL in self.load_batches():
            yield self.model(values, self.pipeline.tokenizer.teacher_inputs(tokens_BL), hidden_block=hidden)

    def check_block(self, number: int, default: int) -> int:
        """The number of a block, counted from 1; `default` for 0. UserError when the model has no such block."""
        depth = len(self.model.blocks)
        if not 0 <= number <= depth:
            raise UserError(f"{self.name} has blocks 1 to {depth}; there is no block {number}")
        return number or max(default, 1)

    def list_experts(self) -> list[str]:
        """Names of the experts; UserError for a dense model."""
        config: ExpertsConfig = self.model.config.experts
        if config.router == "none":
            raise UserError(f"{self.name} is a dense model: it has no experts; give a mixture of experts")
        return name_experts(config)


def open_models(
    models: Sequence[str], names: Sequence[str], data: str, config: AnalysisConfig
) -> Iterator[AnalyzedModel]:
    """Load these checkpoints (folders, or names on the hub), each with the held-out images of `data`.

    `data`: images, or a token cache. `names`: names of the models in the report; empty = those of their folders. Raises
    UserError when the names are too few or not distinct, and when the data is not the model's.
    """
    for model, name in zip(models, check_distinct(choose_names(models, names)), strict=True):
        pipeline = Pipeline.from_pretrained(model, device=config.device)
        held_out = _open_held_out(data, pipeline, name, config)
        yield AnalyzedModel(name, pipeline, held_out, range(min(len(held_out), config.num or len(held_out))), config)


def name_experts(config: ExpertsConfig) -> list[str]:
    """Names of a mixture's experts: those with an FFN first, then the zero-computation ones."""
    names = [f"E{i + 1}" for i in range(config.count)]
    counts = {"zero": config.zero, "copy": config.copy, "constant": config.constant}
    for kind, count in counts.items() if config.zero_computation else ():
        names += [f"{kind} {i + 1}" if count > 1 else kind for i in range(count)]
    return names


def name_scales(pyramid: Pyramid) -> list[str]:
    """The scales as height x width, preceded by their number where two scales have the same size."""
    names = [f"{h}x{w}" for h, w in pyramid.sides]
    return names if len(set(names)) == len(names) else [f"{k}: {name}" for k, name in enumerate(names, start=1)]


def choose_names(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names of models or runs in a report: `names` where given, else the folders' names, else the paths.

    Raises UserError when the numbers differ or `sources` is empty.
    """
    if not sources:
        raise UserError("at least one checkpoint or run folder is needed; got none")
    if names and len(names) != len(sources):
        raise UserError(f"--names must name each of the {len(sources)} folders; got {len(names)} names")
    short = [Path(source).resolve().name or source for source in sources]
    return list(names) or (short if len(set(short)) == len(short) else list(sources))


def check_distinct(names: list[str]) -> list[str]:
    """The names; UserError when two are equal."""
    if len(set(names)) < len(names):
        raise UserError(f"models must have different names; got {', '.join(names)}: tell them apart with --names")
    return names


def _open_held_out(data: str, pipeline: Pipeline, name: str, config: AnalysisConfig) -> Examples:
    """The held-out images of `data`; UserError when they have other classes than the model."""
    known = Classes.of_model(name, pipeline.config)
    _, held_out, match = open_matched_examples(
        data, known, pipeline.config, pipeline.tokenizer, config.images, config.seed
    )
    match.print_note()
    if not len(held_out):
        raise UserError(f"{data} holds out no images: encode it again with a larger --images.held-out")
    return held_out


def describe_analysis(data: str, config: AnalysisConfig, device: torch.device) -> dict[str, Any]:
    """The data, seed and machine, which every report names."""
    return {"data": data, "seed": config.seed, "machine": describe_machine(device)}


def choose_labels(pipeline: Pipeline, labels: Labels, count: int) -> list[int | None]:
    """The class of each of `count` images that a figure draws: these in turn, or all classes in turn."""
    every = range(pipeline.transformer.config.condition.require_classes("this figure draws images"))
    chosen = pipeline.label_indices(list(every) if is_empty(labels) else labels)
    return [chosen[i % len(chosen)] for i in range(count)]


def is_empty(labels: Labels) -> bool:
    """Whether no labels are given, which stands for all classes; None is "no label"."""
    return isinstance(labels, str | Sequence) and not labels
