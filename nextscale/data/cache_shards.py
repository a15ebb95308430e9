"""The shards of a token cache: their names, and what they must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextscale.checkpoints.shards import Form, check_range
from nextscale.data.cache_head import ControlHead, TextHead
from nextscale.data.cached_control import list_control_forms
from nextscale.data.cached_text import check_text, list_text_forms

REMEDY = "delete it and run `nextscale tokenize` again"


@dataclass(frozen=True)
class ShardLimits:
    """What the shards of a cache must hold."""

    cache: str
    """Digest of cache.json; empty where an earlier version wrote it."""
    views: int
    length: int
    """Tokens of an image."""
    vocab_size: int
    classes: int
    features: bool
    text: TextHead | None = None
    control: ControlHead | None = None

    def list_forms(self, rows: int) -> dict[str, Form]:
        """Dtype and shape of each tensor of a shard with so many examples."""
        forms: dict[str, Form] = {
            "tokens": ([choose_token_dtype(self.vocab_size)], (rows, self.views, self.length)),
            "labels": ([torch.int64], (rows,)),
        }
        features: Form = ([torch.float16], (rows, self.views, None, None, None))
        forms |= ({"features": features} if self.features else {}) | list_text_forms(self.text, rows)
        return forms | list_control_forms(self.control, rows, self.views)

    def check_values(self, path: Path, shard: dict[str, Tensor]) -> None:
        """Raise UserError when a token is beyond the codebook, a label beyond the classes, or captions do not fit."""
        check_text(path, shard, self.text, REMEDY)
        check_range(path, shard, {"tokens": self.vocab_size, "labels": self.classes}, REMEDY)


def choose_token_dtype(vocab_size: int) -> torch.dtype:
    """The integers that hold a token."""
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def name_shard(split: str, number: int) -> str:
    """The file of a shard."""
    return f"{split}-{number:05d}.safetensors"
