"""Carrying a trained model over to other classes and another pyramid, before it is fine-tuned.

Everything that does not depend on classes or map sides is kept to the bit: tokenizer, blocks, head. Class embeddings
are kept, mapped or made new; position embeddings are resampled map by map. With nothing changed, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.checkpoints import Checkpoint, transformer_config
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.model import ModelConfig
from nextscale.config.parse import suggest_name
from nextscale.pyramid import Pyramid, Side


@dataclass(frozen=True)
class NewClass:
    """A class of the adapted model."""

    name: str
    source: int | None = None
    """Index of the class whose embedding it starts from; None: the mean of all, plus noise."""


def parse_classes(text: str, config: ModelConfig) -> tuple[NewClass, ...]:
    """Classes from text: "5" (five new ones), or names separated by commas, each with =OLD to start from a class.

    OLD is an index or a name of the present model. "cat=281,dog,my bird=ostrich" gives three classes.
    """
    if text.strip().isdigit():
        return tuple(NewClass(str(i)) for i in range(int(text)))
    classes = []
    for part in text.split(","):
        name, equals, old = (piece.strip() for piece in part.partition("="))
        if not name or (equals and not old):
            raise UserError(f"--classes '{text}': '{part}' is neither NAME nor NAME=OLD")
        classes.append(NewClass(name, _class_index(old, config) if equals else None))
    return tuple(classes)


def _class_index(old: str, config: ModelConfig) -> int:
    count = transformer_config(config, "adapt").condition.num_classes
    if old.isdigit() and int(old) < count:
        return int(old)
    if old in config.class_names:
        return config.class_names.index(old)
    hint = suggest_name(old, list(config.class_names)) if config.class_names else ""
    raise UserError(f"the model has no class '{old}' ({count} classes, 0 to {count - 1}){hint}")


def adapt(
    checkpoint: Checkpoint, classes: Sequence[NewClass] | None, pyramid: Pyramid | None, seed: int = 0
) -> Checkpoint:
    """The checkpoint with other classes and another pyramid; None leaves either as it is.

    A scale of the new pyramid takes its position and level embeddings, and what routers know of it, from the scale that
    stands at the same progress between first and last; positions are resampled bicubically where the sides differ.
    """
    config, model = checkpoint.config, transformer_config(checkpoint.config, "adapt")
    transformer, tokenizer = dict(checkpoint.transformer), dict(checkpoint.tokenizer)
    if classes is not None:
        key = "condition.embedding.weight"
        transformer[key] = _class_embeddings(transformer[key], classes, seed)
        condition = replace(model.condition, num_classes=len(classes))
        model = replace(model, condition=condition)
        config = replace(config, transformer=model, class_names=tuple(c.name for c in classes))
    if pyramid is not None and pyramid != config.pyramid:
        source = scale_sources(config.pyramid, pyramid)
        transformer |= _positions(transformer, config.pyramid, pyramid, source)
        tokenizer["quantizer.usage_KV"] = tokenizer["quantizer.usage_KV"][source]
        config = replace(config, pyramid=pyramid)
    origin = dict(checkpoint.origin)
    extras = checkpoint.extras if config == checkpoint.config else {}
    return Checkpoint(config, tokenizer, transformer, origin, extras)


def scale_sources(old: Pyramid, new: Pyramid) -> list[int]:
    """For each scale of `new`, the scale of `old` at the nearest progress; the earlier one on ties."""
    return [min(range(len(old)), key=lambda j: abs(old.progress(j) - new.progress(k))) for k in range(len(new))]


def _class_embeddings(old: Tensor, classes: Sequence[NewClass], seed: int) -> Tensor:
    """(classes + 1, D): mapped rows are copies; new ones start at the mean, apart by VAR's initial spread."""
    rows, mean, std = [], old[:-1].float().mean(dim=0), math.sqrt(1 / (3 * old.shape[1]))
    for i, new in enumerate(classes):
        if new.source is not None:
            rows.append(old[new.source])
        else:
            noise = torch.randn(old.shape[1], generator=make_generator(seed, "new class", i))
            rows.append((mean + std * noise).to(old.dtype))
    return torch.stack([*rows, old[-1]])  # the last row means "no label"


def _positions(tensors: dict[str, Tensor], old: Pyramid, new: Pyramid, source: list[int]) -> dict[str, Tensor]:
    maps = []
    for k, j in enumerate(source):
        start, end = old.spans[j]
        maps.append(resample(tensors["pos_embed"][:, start:end], old.sides[j], new.sides[k]))
    return {
        "pos_embed": torch.cat(maps, dim=1),
        "pos_start": resample(tensors["pos_start"], old.sides[0], new.sides[0]),
        "level_embed.weight": tensors["level_embed.weight"][source],
        **{n: t[source] for n, t in tensors.items() if n.endswith(".router.scale_embed.weight")},
    }


def resample(embedding_1ND: Tensor, old: Side, new: Side) -> Tensor:
    """A map of embeddings (1, N, D) at another side, bicubically; itself when the side is the same."""
    if old == new:
        return embedding_1ND
    map_1Dhw = embedding_1ND.float().transpose(1, 2).unflatten(-1, old)
    resized = F.interpolate(map_1Dhw, new, mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(embedding_1ND.dtype).contiguous()
