"""The token cache: a data set encoded once by a tokenizer, so that training reads tokens instead of images.

    cache.json                          its settings: data, crop, tokenizer, scales, classes; written first
    inputs.json                         fingerprint of the data
    train-00000.safetensors ...         the examples of one shard: tokens (n, views, L), labels (n), and, with an
                                        encoder, its features (n, views, h, w, C), float16
    held_out-00000.safetensors ...

Shards are memory-mapped when read. Each is written atomically, so an interrupted run continues with the first missing
one. With several processes each encodes every n-th shard. A shard knows its name and the cache that it belongs to, and
carries digests, see `nextscale.checkpoints.shards`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints.shards import Form, check_range, read_owner, read_shard, verify_shard, write_shard
from nextscale.common.digest import add_digest
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.inputs import INPUTS, check_inputs
from nextscale.config.data import DataConfig
from nextscale.config.migrate import migrate_record
from nextscale.config.model import ModelConfig
from nextscale.data.cache_head import FORMAT, SPLITS, VERSION, read_cache_head
from nextscale.data.datasets import open_dataset
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Batch, Examples, check_unreadable
from nextscale.data.inputs import describe_cache
from nextscale.encoders.patches import PatchEncoder
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit

_REMEDY = "delete it and run `nextscale tokenize` again"
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


class CacheWriter:
    """Encodes the splits of a data set into a folder, shard by shard.

    `views`: how often each training image is encoded, each time with another random crop and flip; held-out images are
    encoded once, without either. `encoder`: stores its features of the same views, on the grid of the last scale.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, splits: dict[str, Examples], views: int, shard: int,
        max_unreadable: float = 0.1, encoder: PatchEncoder | None = None,
    ):  # fmt: skip
        self.folder, self.tokenizer, self.splits, self.views, self.shard = folder, tokenizer, splits, views, shard
        self.max_unreadable, self.encoder = max_unreadable, encoder
        self.unreadable: dict[str, None] = {}

    def record_settings(
        self, class_names: tuple[str, ...], data_settings: dict[str, Any], accept_changes: bool = False
    ) -> None:
        """Write cache.json and inputs.json, or check that existing ones are the same; UserError names what differs.

        `data_settings`: the data, its crop and its split. `accept_changes`: the data may have changed, not settings.
        """
        head = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": fingerprint_tokenizer(self.tokenizer),
            "scales": str(self.tokenizer.pyramid),
            "vocab_size": self.tokenizer.config.vocab_size,
            "class_names": list(class_names),
            "examples": {split: len(examples) for split, examples in self.splits.items()},
            "views": self.views,
            "shard": self.shard,
            "encoder": self.encoder.fingerprint() if self.encoder else "",
            **data_settings,
        }
        path = self.folder / "cache.json"
        if path.exists():
            before = migrate_record(read_cache_head(path))
            changed = [f"{k} was {before.get(k)}, now {v}" for k, v in head.items() if before.get(k) != v]
            if changed:
                raise UserError(
                    f"{self.folder} holds a cache with other settings ({'; '.join(changed)}); choose another --out"
                )
            self._check_inputs(path, accept_changes)
            for draft in self.folder.glob(".*.part*"):  # left by a run that was killed while writing
                draft.unlink(missing_ok=True)
        else:
            write_json(self.folder / INPUTS, self._list_inputs())
            write_json(path, add_digest(head))

    def _list_inputs(self) -> dict[str, Any]:
        return {"data": self.splits["train"].inputs}

    def _check_inputs(self, begun: Path, accept_changes: bool) -> None:
        """Compare the data with those of the shards that exist; UserError names what changed."""
        advice = (
            "choose another --out, or delete it; if the images are the same, give --accept-changes to keep what it has"
        )
        check_inputs(self.folder / INPUTS, self._list_inputs(), begun, advice, accept=accept_changes)
        if accept_changes:
            write_json(self.folder / INPUTS, self._list_inputs())

    def is_complete(self) -> bool:
        """Whether no shard is missing."""
        numbers = ((split, n) for split in SPLITS for n in range(-(-len(self.splits[split]) // self.shard)))
        return all((self.folder / _name_shard(split, number)).exists() for split, number in numbers)

    def write(self, rank: int = 0, size: int = 1, batch: int = 64, show: bool = True) -> None:
        """Encode every missing shard whose number is `rank` modulo `size`."""
        missing = [
            (split, number)
            for split in SPLITS
            for number in range(-(-len(self.splits[split]) // self.shard))
            if number % size == rank and not (self.folder / _name_shard(split, number)).exists()
        ]
        total = sum(len(self._select_rows(split, number)) * self._count_views(split) for split, number in missing)
        owner = read_owner(self.folder / "cache.json")
        with tqdm(total=total, desc="encoding", unit="image", disable=not show) as bar:
            for split, number in missing:
                tensors = self._encode_rows(split, self._select_rows(split, number), batch, bar)
                path = self.folder / _name_shard(split, number)
                with write_atomically(path) as (draft,):
                    write_shard(draft, path, tensors, owner)

    def _select_rows(self, split: str, number: int) -> range:
        """The examples of a shard."""
        return range(number * self.shard, min((number + 1) * self.shard, len(self.splits[split])))

    def _count_views(self, split: str) -> int:
        return self.views if split == "train" else 1

    @torch.no_grad()
    def _encode_rows(self, split: str, rows: range, batch: int, bar: tqdm) -> dict[str, Tensor]:
        """The tensors of a shard."""
        examples, count = self.splits[split], len(self.splits[split])
        views: list[dict[str, Tensor]] = []
        for view in range(self._count_views(split)):
            tensors: dict[str, list[Tensor]] = {}
            for start in range(rows.start, rows.stop, batch):
                indices = range(start, min(start + batch, rows.stop))
                positions = [view * count + i for i in indices] if split == "train" else None
                images = examples.fetch(indices, positions)
                self.unreadable.update(dict.fromkeys(images.get("unreadable", ())))
                check_unreadable(list(self.unreadable), count, self.max_unreadable)
                for name, tensor in self._encode_batch(images).items():
                    tensors.setdefault(name, []).append(tensor.cpu())
                bar.update(len(indices))
            views.append({name: torch.cat(batches) for name, batches in tensors.items()})
        labels = views[0]["labels"]
        return {n: torch.stack([v[n] for v in views], dim=1) for n in views[0] if n != "labels"} | {"labels": labels}

    def _encode_batch(self, images: Batch) -> dict[str, Tensor]:
        """Tokens, labels and, with an encoder, features."""
        dtype = _choose_dtype(self.tokenizer.config.vocab_size)
        image_B3HW = scale_to_unit(images["image"].to(self.tokenizer.quantizer.codebook.weight.device))
        encoded = {"tokens": self.tokenizer.encode(image_B3HW).to(dtype), "labels": images["label"]}
        if self.encoder is not None:
            encoded["features"] = self.encoder(image_B3HW, self.tokenizer.pyramid.last).half()
        return encoded


def _choose_dtype(vocab_size: int) -> torch.dtype:
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def _join(labels: list[Tensor]) -> Tensor:
    """The labels of all shards; a split may be empty."""
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


def _name_shard(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


class TokenCache:
    """A folder written by CacheWriter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.head = read_cache_head(folder / "cache.json", _REMEDY)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(self.head["class_names"])

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
            path = self.folder / _name_shard(split, number)
            if not path.exists():
                raise UserError(f"{path} is missing: the cache is unfinished; run `nextscale tokenize` again to go on")
            shards.append(path)
        views, length = self.head["views"] if split == "train" else 1, Pyramid.parse(self.head["scales"]).length
        limits = ShardLimits(
            str(self.head.get("digest", "")), views, length, self.head["vocab_size"], len(self.class_names),
            bool(self.head.get("encoder")),
        )  # fmt: skip
        examples = CachedExamples(shards, count, size, limits)
        examples.inputs = describe_cache(self.folder)
        return examples


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

    def list_forms(self, rows: int) -> dict[str, Form]:
        """Dtype and shape of each tensor of a shard with so many examples."""
        forms: dict[str, Form] = {
            "tokens": ([_choose_dtype(self.vocab_size)], (rows, self.views, self.length)),
            "labels": ([torch.int64], (rows,)),
        }
        return forms | ({"features": ([torch.float16], (rows, self.views, None, None, None))} if self.features else {})

    def check_values(self, path: Path, shard: dict[str, Tensor]) -> None:
        """Raise UserError when a token is beyond the codebook or a label beyond the classes."""
        check_range(path, shard, {"tokens": self.vocab_size, "labels": self.classes}, _REMEDY)


class CachedExamples:
    """Tokens and labels of a cache's split. Epoch e uses view (e + index) mod views of an image.

    The values of a shard are compared with its digests when it is first used, tensors above 256 MiB excepted.
    """

    skipped: Sequence[str] = ()
    decodes: bool = False

    def __init__(self, shards: Sequence[Path], count: int, size: int, limits: ShardLimits):
        self.paths, self.count, self.size, self.limits = shards, count, size, limits
        self._label_of: Tensor | None = None
        self.inputs: dict[str, Any] = {}
        self._verified: set[int] = set()
        if shards:
            _ = self._shards  # names what is missing or damaged before training starts

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        rows = [min(self.size, self.count - i * self.size) for i in range(len(self.paths))]
        return [
            read_shard(path, self.limits.cache, self.limits.list_forms(n), _REMEDY)
            for path, n in zip(self.paths, rows, strict=True)
        ]

    def _use_shard(self, number: int) -> dict[str, Tensor]:
        """A shard, whose values are verified at its first use."""
        shard = self._shards[number]
        if number not in self._verified:
            names = [name for name, tensor in shard.items() if tensor.nbytes <= _LARGE]
            verify_shard(self.paths[number], names, _REMEDY)
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
            for name, tensor in shard.items():
                rows.setdefault(name, []).append(tensor[row] if name == "labels" else tensor[row, view])
        batch = {name: torch.stack(tensors) for name, tensors in rows.items()}
        return {"label": self._map_labels(batch.pop("labels")), **batch}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"} | {"_verified": set()}


def open_examples(
    data: str, model: ModelConfig, tokenizer: Tokenizer, config: DataConfig, seed: int
) -> tuple[Examples, Examples, tuple[str, ...]]:
    """(training, held-out) examples of a token cache or of a data set of images, and the names of their classes.

    Images of a data set get the model's size. Prints the classes with their counts, and what is not used. Raises
    UserError when a cache was made by another tokenizer than the model's, and in the same cases as `open_dataset`.
    """
    if is_token_cache(Path(data)):
        cache = TokenCache(Path(data))
        cache.check_tokenizer(tokenizer)
        cached, rest = cache.load_examples("train"), cache.load_examples("held_out")
        print_data_set(cache.class_names, [cached.stored_labels_N, rest.stored_labels_N])
        return cached, rest, cache.class_names
    train, held_out, source = open_dataset(data, model.image_size, config, seed)
    print_data_set(source.class_names, [train.labels_B, held_out.labels_B], train.notes)
    return train, held_out, source.class_names
