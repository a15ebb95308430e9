"""cache.json, the settings of a token cache: read with the types and ranges of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextscale.common.errors import UserError
from nextscale.common.reading import read_json
from nextscale.config.parse import check_fields, parse_record
from nextscale.pyramid import Pyramid

FORMAT, VERSION = "nextscale-tokens", 1
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class TextHead:
    """The captions of a cache and, with a text encoder, its embeddings of them."""

    encoder: str = ""
    """Fingerprint of the text encoder and its tokenizer; empty = the captions alone."""
    source: str = ""
    """Folder or hub name of the text encoder."""
    max_tokens: int = 0
    """Tokens of a caption that are kept, at most."""
    width: int = 0
    """E, of the embedding of a token."""

    def __post_init__(self) -> None:
        filled = bool(self.encoder)
        rules = {
            "max_tokens must be 1 to 2^16, and 0 without an encoder": filled <= self.max_tokens <= filled * 2**16,
            "width must be 1 to 2^20, and 0 without an encoder": filled <= self.width <= filled * 2**20,
        }
        check_fields("text", self, rules)


@dataclass(frozen=True)
class ControlHead:
    """The control pictures of a cache."""

    kinds: tuple[Literal["edges", "low-resolution"], ...]
    size: tuple[int, int]
    """Height and width of the images."""

    def __post_init__(self) -> None:
        rules = {
            "kinds must be different, one at least": 1 <= len(self.kinds) == len({*self.kinds}),
            "size must be 1 to 2^16 by 1 to 2^16": all(1 <= side <= 2**16 for side in self.size),
        }
        check_fields("control", self, rules)


@dataclass(frozen=True)
class CacheHead:
    """The fields of cache.json that a reader depends on."""

    format: str
    version: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    scales: str
    vocab_size: int
    class_names: tuple[str, ...]
    examples: dict[str, int]
    """Number of examples by split."""
    views: int
    shard: int
    """Examples in one file."""
    encoder: str = ""
    """Fingerprint of the encoder whose features are stored; empty = none."""
    text: TextHead | None = None
    """None = no captions are stored."""
    control: ControlHead | None = None
    """None = no control pictures are stored."""
    other: dict[str, Any] = field(default_factory=dict)
    """What decided the content besides: the data, their crop and split."""

    def __post_init__(self) -> None:
        rules = {
            "vocab_size must be 1 to 2^24": 1 <= self.vocab_size <= 2**24,
            "class_names must be different names, one at least": 1 <= len(self.class_names) == len({*self.class_names}),
            "examples must have a number for train and for held_out, of 0 to 2^40": {*self.examples} == {*SPLITS}
            and all(0 <= count <= 2**40 for count in self.examples.values()),
            "views must be 1 to 2^20": 1 <= self.views <= 2**20,
            "shard must be 1 to 2^40": 1 <= self.shard <= 2**40,
        }
        check_fields("cache", self, rules)
        Pyramid.parse(self.scales)


def read_cache_head(path: Path, remedy: str = "delete it and run `nextscale tokenize` again") -> dict[str, Any]:
    """Read a cache.json. Raises UserError naming the file and the field that is missing, mistyped or out of range."""
    head = read_json(path)
    if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not of a token cache that this nextscale can read")
    parse_record(CacheHead, head, path, remedy)
    return head
