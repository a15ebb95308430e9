"""A model and the held-out images that it is shown, teacher-forced: what most analyses work on."""

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
from nextscale.data.cache import open_examples
from nextscale.data.examples import Examples, check_unreadable
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.transformer.var import VAR, Output

_SHOWN_FROM = 20


@dataclass(frozen=True)
class Subject:
    """A model, what to call it, and the images it is shown."""

    name: str
    pipeline: Pipeline
    held_out: Examples
    rows: range
    """Which of the held-out images."""
    config: AnalysisConfig

    @property
    def model(self) -> VAR:
        return self.pipeline.transformer

    @property
    def scales(self) -> list[str]:
        """Each scale's map as height x width."""
        return scale_names(self.model.pyramid)

    def alone(self, number: int) -> Subject:
        """The model with this one held-out image; UserError when there is none of this number."""
        if not 0 <= number < len(self.held_out):
            raise UserError(f"there is no image {number}: held-out images are numbered 0 to {len(self.held_out) - 1}")
        return replace(self, rows=range(number, number + 1))

    def tokens(self, rows: range) -> tuple[Tensor, Tensor]:
        """Labels (B,) and tokens (B, L) of these held-out images, int64, on the model's device."""
        batch = self.held_out.fetch(rows, None)
        check_unreadable(batch.get("unreadable", ()), len(self.rows), self.config.images.max_unreadable)
        device = self.pipeline.device
        if "tokens" in batch:
            return batch["label"].to(device), batch["tokens"].to(device).long()
        return batch["label"].to(device), self.pipeline.tokenizer.encode(scale_to_unit(batch["image"].to(device)))

    @torch.no_grad()
    def outputs(self, hidden: int = 0) -> Iterator[Output]:
        """What the model gives for all images, a batch after the other. `hidden`: as in `VAR.forward`."""
        size = self.config.batch_size
        batches = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        for rows in tqdm(batches, desc=self.name, unit="batch", disable=len(batches) < _SHOWN_FROM):
            labels_B, tokens_BL = self.tokens(rows)
            yield self.model(labels_B, self.pipeline.tokenizer.teacher_inputs(tokens_BL), hidden_block=hidden)

    def block(self, number: int, default: int) -> int:
        """A block's number counted from 1, `default` for 0; UserError when the model has no such block."""
        depth = len(self.model.blocks)
        if not 0 <= number <= depth:
            raise UserError(f"{self.name} has blocks 1 to {depth}; there is no block {number}")
        return number or max(default, 1)

    def experts(self) -> list[str]:
        """Names of the experts; UserError for a dense model."""
        config: ExpertsConfig = self.model.config.experts
        if config.router == "none":
            raise UserError(f"{self.name} is a dense model: it has no experts to look at; give a mixture of experts")
        names = [f"E{i + 1}" for i in range(config.count)]
        kinds = (
            (("zero", config.zero), ("copy", config.copy), ("constant", config.constant))
            if config.zero_computation
            else ()
        )
        return names + [f"{kind} {i + 1}" if many > 1 else kind for kind, many in kinds for i in range(many)]


def subjects(models: Sequence[str], names: Sequence[str], data: str, config: AnalysisConfig) -> Iterator[Subject]:
    """Each of these checkpoints (folders, or names on the hub) with the held-out images of `data`.

    `data`: images, or a token cache. `names`: what to call the models; none = by their folders. Raises UserError when
    they are not as many or not distinct, and when model and data do not belong together.
    """
    for model, name in zip(models, distinct(titles(models, names)), strict=True):
        pipeline = Pipeline.from_pretrained(model, device=config.device)
        held_out = _open(data, pipeline, name, config)
        yield Subject(name, pipeline, held_out, range(min(len(held_out), config.num or len(held_out))), config)


def scale_names(pyramid: Pyramid) -> list[str]:
    """Each scale's map as height x width, with its number in front where two are of one size."""
    names = [f"{h}x{w}" for h, w in pyramid.sides]
    return names if len(set(names)) == len(names) else [f"{k}: {name}" for k, name in enumerate(names, start=1)]


def titles(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """What to call these models or runs: their names where given, else their folders' or, where those
    are equal, the paths. UserError when the numbers differ, or there is nothing to call."""
    if not sources:
        raise UserError("at least one checkpoint or run folder is needed; got none")
    if names and len(names) != len(sources):
        raise UserError(f"--names must name each of the {len(sources)} folders; got {len(names)} names")
    short = [Path(source).resolve().name or source for source in sources]
    return list(names) or (short if len(set(short)) == len(short) else list(sources))


def distinct(names: list[str]) -> list[str]:
    """The names; UserError when two are equal."""
    if len(set(names)) < len(names):
        raise UserError(f"models must have different names; got {', '.join(names)}: tell them apart with --names")
    return names


def _open(data: str, pipeline: Pipeline, name: str, config: AnalysisConfig) -> Examples:
    """The held-out images of `data`, or UserError when they are not of the model's kind."""
    _, held_out, classes = open_examples(data, pipeline.config, pipeline.tokenizer, config.images, config.seed)
    own, number = pipeline.config.class_names, pipeline.transformer.config.condition.num_classes
    if len(classes) != number or (own and number > 1 and own != classes):
        raise UserError(
            f"{data} has other classes ({_some(classes)}) than {name} was trained on "
            f"({_some(own) if own else number}): show it images of its own classes"
        )
    if not len(held_out):
        raise UserError(f"{data} holds out no images: make the cache anew with a larger --images.held-out")
    return held_out


def _some(names: Sequence[str]) -> str:
    more = f", ... {len(names)} in all" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def about(data: str, config: AnalysisConfig, device: torch.device) -> dict[str, Any]:
    """What every report says of how it was made."""
    return {"data": data, "seed": config.seed, "machine": describe_machine(device)}
