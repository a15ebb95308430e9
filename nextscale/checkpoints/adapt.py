"""Adapt a trained model to other classes and another pyramid, before it is fine-tuned.

Tokenizer, blocks and head do not depend on classes or map sides, and stay equal bit for bit. Class embeddings are
copied or drawn; position embeddings are resampled map by map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.parts import get_transformer_config
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.classes import index_names, list_names, parse_entries
from nextscale.config.model import ModelConfig
from nextscale.pyramid import Pyramid, match_scales
from nextscale.transformer.positions import resample_map, resample_table

_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class NewClass:
    """A class of the adapted model."""

    name: str
    source: int | None = None
    """Index of the class whose embedding it starts from; None = the mean of all classes, plus noise."""


def parse_classes(text: str, config: ModelConfig) -> tuple[NewClass, ...]:
    """Parse "5" (five new classes), or names separated by commas; NAME=OLD starts from a class of the model.

    OLD is a class of the given model as `nextscale.config.classes` reads it. "cat=281,dog,my bird=ostrich" gives three
    classes. A name with a comma or an equals sign is put in double quotes. Raises UserError for an entry that is
    neither form, for a number of classes that makes no sense, and for two classes of one name.
    """
    get_transformer_config(config, "adapt")
    if re.fullmatch(r"\s*-?[0-9]+\s*", text):
        if len(text.strip()) > 18 or not 1 <= int(text) <= _MAX_CLASSES:
            raise UserError(f"--classes must be 1 to {_MAX_CLASSES:,} or names; got {text.strip()[:40]}")
        return tuple(NewClass(str(i)) for i in range(int(text)))
    table = index_names(config.class_names)
    classes = parse_entries(text, lambda entry: _parse_new_class(entry, config), table, "--classes")
    names = [new.name for new in classes]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--classes '{text}' names a class twice: {list_names(repeated)}")
    return tuple(classes)


def _parse_new_class(entry: str, config: ModelConfig) -> NewClass:
    """NAME or NAME=OLD."""
    match = re.fullmatch(r'\s*("(?:[^"]|"")*"|[^"=][^=]*?)\s*(?:=(.*))?', entry, re.DOTALL)
    if not match or (match[2] is not None and not match[2].strip()):
        raise UserError(f"--classes: '{entry}' is neither NAME nor NAME=OLD")
    name, old = match[1], match[2]
    if name.startswith('"'):
        name = name[1:-1].replace('""', '"')
    elif "," in name and not index_names(config.class_names).find(name):
        raise UserError(f"--classes: '{entry}' has a comma in the new name; put the name in double quotes")
    source = config.find_class(old) if old is not None else None
    if not name or (old is not None and source is None):
        raise UserError(f"--classes: '{entry}' is neither NAME nor NAME=OLD, with a class of the model as OLD")
    return NewClass(name, source)


def adapt(
    checkpoint: Checkpoint, classes: Sequence[NewClass] | None, pyramid: Pyramid | None, seed: int = 0
) -> Checkpoint:
    """The checkpoint with other classes and another pyramid; None leaves them unchanged.

    A scale of the new pyramid copies the position, level and router embeddings of the scale of the old one that is at
    the same relative place between first and last. Position embeddings are resampled bicubically where sides differ.
    """
    config, model = checkpoint.config, get_transformer_config(checkpoint.config, "adapt")
    transformer, tokenizer = dict(checkpoint.transformer), checkpoint.tokenizer
    if classes is not None:
        model.condition.require_classes("--classes is for models that draw images")
        key = "condition.embedding.weight"
        transformer[key] = make_class_embeddings(transformer[key], classes, seed)
        condition = replace(model.condition, num_classes=len(classes))
        model = replace(model, condition=condition)
        config = replace(config, transformer=model, class_names=tuple(c.name for c in classes))
    if pyramid is not None and pyramid != config.pyramid:
        transformer |= _resample_positions(transformer, config.pyramid, pyramid)
        tokenizer = adapt_tokenizer(checkpoint, pyramid).tokenizer
        config = replace(config, pyramid=pyramid, sizes=())
    origin = dict(checkpoint.origin)
    extras = checkpoint.extras if config == checkpoint.config else {}
    return Checkpoint(config, tokenizer, transformer, origin, extras)


def adapt_tokenizer(checkpoint: Checkpoint, pyramid: Pyramid) -> Checkpoint:
    """The checkpoint with a tokenizer for another pyramid; its layers do not depend on it."""
    name, source = "quantizer.usage_KV", match_scales(checkpoint.config.pyramid, pyramid)
    tokenizer = checkpoint.tokenizer | {name: checkpoint.tokenizer[name][source]}
    return replace(checkpoint, config=replace(checkpoint.config, pyramid=pyramid, sizes=()), tokenizer=tokenizer)


def make_class_embeddings(old: Tensor, classes: Sequence[NewClass], seed: int) -> Tensor:
    """(classes + 1, D): copies of rows, or for new classes the mean of all rows plus noise of VAR's initial spread."""
    rows, mean, std = [], old[:-1].float().mean(dim=0), math.sqrt(1 / (3 * old.shape[1]))
    for i, new in enumerate(classes):
        if new.source is not None:
            rows.append(old[new.source])
        else:
            noise = torch.randn(old.shape[1], generator=make_generator(seed, "new class", i))
            rows.append((mean + std * noise).to(old.dtype))
    return torch.stack([*rows, old[-1]])  # the last row means "no label"


def _resample_positions(tensors: dict[str, Tensor], old: Pyramid, new: Pyramid) -> dict[str, Tensor]:
    """What `VAR.at` computes for another pyramid, as the tables of a model of its own."""
    source = match_scales(old, new)
    tables = {"pos_embed": resample_table(tensors["pos_embed"], old, new)} if "pos_embed" in tensors else {}
    return tables | {
        "pos_start": resample_map(tensors["pos_start"], old.sides[0], new.sides[0]),
        "level_embed.weight": tensors["level_embed.weight"][source],
        **{n: t[source] for n, t in tensors.items() if n.endswith(("router.scale_embed.weight", "router_scales"))},
    }
