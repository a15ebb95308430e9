"""The token cache: a data set encoded once by a tokenizer, so that training reads tokens instead of images.

    cache.json                          its settings: data, crop, tokenizer, scales, classes; written first
    inputs.json                         fingerprint of the data
    train-00000.safetensors ...         the examples of one shard: tokens (n, views, L), labels (n), with an encoder
                                        its features (n, views, h, w, C), float16, captions, see
                                        `nextscale.data.cached_text`, and control pictures, see
                                        `nextscale.data.cached_control`
    held_out-00000.safetensors ...

Shards are memory-mapped when read. Each is written atomically, so an interrupted run continues with the first missing
one. With several processes each encodes every n-th shard. A shard knows its name and the cache that it belongs to, and
carries digests, see `nextscale.checkpoints.shards`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints.shards import read_shard, verify_shard
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.rng import make_generator
from nextscale.config.data import DataConfig
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict
from nextscale.data.cache_head import ControlHead, TextHead, read_cache_head
from nextscale.data.cache_shards import REMEDY, ShardLimits, name_shard
from nextscale.data.cached_control import unpack_control
from nextscale.data.cached_text import TEXT_TENSORS, ShardText, collect_text, join_captions
from nextscale.data.captions import CaptionBytes, TextInput, list_caption_notes
from nextscale.data.datasets import Keep, open_dataset
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Batch, Examples
from nextscale.data.inputs import describe_cache
from nextscale.data.sources.captions import Captions
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer

_LARGE = 2**28
"""Bytes of a tensor above which only `nextscale info --verify` compares it with its digest."""


def is_token_cache(path: Path) -> bool:
    """Whether this folder is a token cache."""
    return (path / "cache.json").is_file()


def fingerprint_tokenizer(tokenizer: Tokenizer) -> str:
    """Fingerprint of what decides an image's tokens and the transformer's inputs: all but the decoder."""
    tensors = {
        name: tensor
        for name, tensor in tokenizer.state_dict().items()
        if not name.startswith(("decoder.", "post_quant_conv.")) and name != "quantizer.usage_KV"
    }
    return compute_fingerprint(tensors, repr((tokenizer.config, tokenizer.pyramid)))


def _join(parts: list[Tensor]) -> Tensor:
    """The labels or the like of all shards; a split may be empty."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


class TokenCache:
    """A folder written by CacheWriter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.head = read_cache_head(folder / "cache.json", REMEDY)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(self.head["class_names"])

    @property
    def text(self) -> TextHead | None:
        """What is stored of captions; None without them."""
        head = self.head.get("text")
        return None if head is None else from_dict(TextHead, head)

    @property
    def control(self) -> ControlHead | None:
        """Which control pictures are stored; None without any."""
        head = self.head.get("control")
        return None if head is None else from_dict(ControlHead, head)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError unless this tokenizer made the cache."""
        if fingerprint_tokenizer(tokenizer) != self.head["tokenizer"]:
            raise UserError(
                f"{self.folder} was made by another tokenizer (scales {self.head['scales']}, {self.head['vocab_size']} "
                "codes): encode the data again with `nextscale tokenize`, or train with the tokenizer that made it"
            )

    def load_examples(self, split: str) -> CachedExamples:
        """The examples of a split, train or held_out. Raises UserError naming shards that are missing or damaged."""
        count, size = self.head["examples"][split], self.head["shard"]
        shards = []
        for number in range(-(-count // size)):
            path = self.folder / name_shard(split, number)
            if not path.exists():
                raise UserError(f"{path} is missing: the cache is unfinished; run `nextscale tokenize` again to go on")
            shards.append(path)
        views, length = self.head["views"] if split == "train" else 1, Pyramid.parse(self.head["scales"]).length
        limits = ShardLimits(
            str(self.head.get("digest", "")), views, length, self.head["vocab_size"], len(self.class_names),
            bool(self.head.get("encoder")), self.text, self.control,
        )  # fmt: skip
        examples = CachedExamples(shards, count, size, limits)
        examples.inputs = describe_cache(self.folder)
        return examples


class CachedExamples:
    """Tokens and labels of a cache's split, and captions where `with_text` asks for them. Epoch e uses view (e + index)
    mod views of an image.

    The values of a shard are compared with its digests when it is first used, tensors above 256 MiB excepted.
    """

    skipped: Sequence[str] = ()
    decodes: bool = False

    def __init__(self, shards: Sequence[Path], count: int, size: int, limits: ShardLimits):
        self.paths, self.count, self.size, self.limits = shards, count, size, limits
        self._label_of: Tensor | None = None
        self._features_of: Tensor | None = None
        self._text: tuple[TextInput, int] | None = None  # and the seed of the draws
        self._text_shards: dict[int, ShardText] = {}
        self.inputs: dict[str, Any] = {}
        self._verified: set[int] = set()
        if shards:
            _ = self._shards  # names what is missing or damaged before training starts

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        rows = [min(self.size, self.count - i * self.size) for i in range(len(self.paths))]
        return [
            read_shard(path, self.limits.cache, self.limits.list_forms(n), REMEDY)
            for path, n in zip(self.paths, rows, strict=True)
        ]

    def _use_shard(self, number: int) -> dict[str, Tensor]:
        """A shard, whose values are verified at its first use."""
        shard = self._shards[number]
        if number not in self._verified:
            names = [name for name, tensor in shard.items() if tensor.nbytes <= _LARGE]
            verify_shard(self.paths[number], names, REMEDY)
            self.limits.check_values(self.paths[number], shard)
            self._verified.add(number)
        return shard

    def _use_shards(self) -> list[dict[str, Tensor]]:
        return [self._use_shard(number) for number in range(len(self.paths))]

    def __len__(self) -> int:
        return self.count

    def relabel(self, label_of: Tensor) -> CachedExamples:
        """The same examples with label `label_of[i]` in place of i."""
        changed = copy.copy(self)
        changed._label_of = label_of
        return changed

    def shuffle_features(self, seed: int) -> CachedExamples:
        """The same examples, each with the features of another one: all images in one cycle of random order."""
        changed, order_N = copy.copy(self), torch.randperm(self.count, generator=make_generator(seed, "features"))
        changed._features_of = torch.empty_like(order_N).scatter_(0, order_N, order_N.roll(1))
        return changed

    @property
    def text_head(self) -> TextHead | None:
        """What is stored of captions; None without them."""
        return self.limits.text

    def with_text(self, text: TextInput, seed: int) -> CachedExamples:
        """The same examples with a caption of each image in their batches, see `collect_text`. Raises UserError when
        the cache lacks what is asked for."""
        head, where = self.text_head, self.inputs.get("where", "the cache")
        again = "make it again with `nextscale tokenize"
        if head is None:
            raise UserError(f"{where} holds no captions: {again} --captions` or with --text-encoder")
        if text.kind == "embeddings":
            if not head.encoder:
                raise UserError(f"{where} holds captions, but no embeddings of them: {again} --text-encoder FOLDER`")
            if text.max_tokens not in (0, head.max_tokens):
                raise UserError(
                    f"{where} holds up to {head.max_tokens} tokens of a caption, not {text.max_tokens}: {again} "
                    f"--text-max-tokens {text.max_tokens}`"
                )
            text = replace(text, max_tokens=head.max_tokens)
        changed = copy.copy(self)
        changed._text = text, seed
        return changed

    @property
    def captions(self) -> Captions | None:
        """The captions of all images; None where none are stored."""
        return None if self.text_head is None else join_captions([*map(self._use_text, range(len(self.paths)))])

    @property
    def caption_lengths_C(self) -> Tensor:
        """Bytes of all captions, without verifying the shards."""
        return _join([shard["caption_length"] for shard in self._shards])

    def _use_text(self, number: int) -> ShardText:
        """The captions of a shard, kept."""
        if number not in self._text_shards:
            self._text_shards[number] = ShardText(self._use_shard(number))
        return self._text_shards[number]

    def _map_labels(self, labels: Tensor) -> Tensor:
        return labels if self._label_of is None else self._label_of[labels]

    @property
    def tokens_NVL(self) -> Tensor:
        """All tokens (N, views, L)."""
        return torch.cat([shard["tokens"] for shard in self._use_shards()])

    @property
    def stored_labels_N(self) -> Tensor:
        """All labels, without verifying the shards."""
        return self._map_labels(_join([shard["labels"] for shard in self._shards]))

    @property
    def labels_N(self) -> Tensor:
        """All labels."""
        return self._map_labels(_join([shard["labels"] for shard in self._use_shards()]))

    @property
    def feature_width(self) -> int:
        """Width of the encoder's features stored with the tokens; 0 where there are none."""
        features = self._shards[0].get("features")
        return 0 if features is None else features.shape[-1]

    def order(self, rng: torch.Generator) -> Tensor:
        return torch.randperm(self.count, generator=rng)

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        rows: dict[str, list[Tensor]] = {}
        for n, i in enumerate(indices):
            shard, row = self._use_shard(i // self.size), i % self.size
            epoch = positions[n] // self.count if positions is not None else 0
            view = (epoch + i) % shard["tokens"].shape[1] if positions is not None else 0
            for name in shard.keys() - TEXT_TENSORS:
                if name == "features" and self._features_of is not None:
                    other = int(self._features_of[i])
                    value = self._use_shard(other // self.size)[name][other % self.size, view]
                else:
                    value = shard[name][row] if name == "labels" else shard[name][row, view]
                rows.setdefault(name, []).append(value)
        batch: Batch = {name: torch.stack(tensors) for name, tensors in sorted(rows.items())}
        batch |= unpack_control(batch, self.limits.control)
        if self._text is not None:
            text, seed = self._text
            places = [(self._use_text(i // self.size), i % self.size) for i in map(int, indices)]
            batch |= collect_text(places, text, seed, positions)
        return {"label": self._map_labels(batch.pop("labels")), **batch}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_shards"}
        return state | {"_verified": set(), "_text_shards": {}}


def open_examples(
    data: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    text: TextInput | None = None,
    keep: Keep | None = None,
) -> tuple[Examples, Examples, tuple[str, ...]]:
    """(training, held-out) examples of a token cache or of a data set of images, and the names of their classes.

    Images of a data set get the model's size. `text`: what batches hold of the captions; None: nothing. `keep`: which
    images of a data set are used, see `open_dataset`. Prints the
    classes with their counts, and what is not used. Raises UserError when a cache was made by another tokenizer than
    the model's, when it lacks what `text` asks for, and in the same cases as `open_dataset`.
    """
    if is_token_cache(Path(data)):
        cache = TokenCache(Path(data))
        cache.check_tokenizer(tokenizer)
        cached, rest = cache.load_examples("train"), cache.load_examples("held_out")
        notes = []
        if text is not None:
            cached, rest = cached.with_text(text, seed), rest.with_text(text, seed)
            lengths = [part.caption_lengths_C for part in (cached, rest)]
            notes = list_caption_notes(lengths, len(cached) + len(rest), text)
        print_data_set(cache.class_names, [cached.stored_labels_N, rest.stored_labels_N], notes)
        return cached, rest, cache.class_names
    if text is not None and text.kind == "embeddings":
        raise UserError(
            f"{data} is a data set of images: embeddings of its captions come from a token cache, which `nextscale "
            f"tokenize {data} --tokenizer TOKENIZER --text-encoder FOLDER --out CACHE` makes"
        )
    train, held_out, source = open_dataset(data, model.image_size, config, seed, captioned=text is not None, keep=keep)
    notes = list(train.notes)
    if train.captions is not None and held_out.captions is not None and text is not None:
        lengths = [torch.from_numpy(captions.length_C) for captions in (train.captions, held_out.captions)]
        notes += list_caption_notes(lengths, len(train) + len(held_out), text)
        train = replace(train, texts=CaptionBytes(train.captions, text.max_tokens, seed))
        held_out = replace(held_out, texts=CaptionBytes(held_out.captions, text.max_tokens, seed))
    print_data_set(source.class_names, [train.labels_B, held_out.labels_B], notes)
    return train, held_out, source.class_names
