"""Writes a token cache; `nextscale.data.cache` has its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints.shards import read_owner, write_shard
from nextscale.common.digest import add_digest
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.inputs import INPUTS, check_inputs
from nextscale.config.migrate import migrate_record
from nextscale.data.cache import fingerprint_tokenizer
from nextscale.data.cache_head import FORMAT, SPLITS, VERSION, TextHead, read_cache_head
from nextscale.data.cache_shards import choose_token_dtype, name_shard
from nextscale.data.cached_control import pack_control
from nextscale.data.cached_text import encode_captions
from nextscale.data.captions import AllCaptions
from nextscale.data.datasets import ImageExamples
from nextscale.data.examples import Batch, Examples, check_unreadable
from nextscale.encoders.patches import PatchEncoder
from nextscale.encoders.text import TextEncoder
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit


class CacheWriter:
    """Encodes the splits of a data set into a folder, shard by shard.

    `views`: how often each training image is encoded, each time with another random crop and flip; held-out images are
    encoded once, without either. `encoder`: stores its features of the same views, on the grid of the last scale.
    Captions are stored where the splits are images that have them, and with `text_encoder` its embeddings of them.
    `control`: the kinds of control pictures that are computed from the same views and stored.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, splits: dict[str, Examples], views: int, shard: int,
        max_unreadable: float = 0.1, encoder: PatchEncoder | None = None, text_encoder: TextEncoder | None = None,
        control: Sequence[str] = (),
    ):  # fmt: skip
        self.folder, self.tokenizer, self.views, self.shard = folder, tokenizer, views, shard
        self.splits = {name: _show_captions(examples) for name, examples in splits.items()}
        self.max_unreadable, self.encoder, self.text_encoder = max_unreadable, encoder, text_encoder
        self.control = control
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
        text = self._describe_text()
        head |= {} if text is None else {"text": asdict(text)}
        size = [side * self.tokenizer.config.downsampling for side in self.tokenizer.pyramid.last]
        head |= {"control": {"kinds": list(self.control), "size": size}} if self.control else {}
        path = self.folder / "cache.json"
        if path.exists():
            before = migrate_record(read_cache_head(path))
            names = dict.fromkeys([*head, *(name for name in ("text", "control") if name in before)])
            changed = [f"{k} was {before.get(k)}, now {head.get(k)}" for k in names if before.get(k) != head.get(k)]
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

    def _describe_text(self) -> TextHead | None:
        """What is stored of captions; None without them."""
        if getattr(self.splits["train"], "captions", None) is None:
            return None
        encoder = self.text_encoder
        if encoder is None:
            return TextHead()
        return TextHead(encoder.fingerprint(), encoder.source, encoder.max_tokens, encoder.width)

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
        return all((self.folder / name_shard(split, number)).exists() for split, number in numbers)

    def write(self, rank: int = 0, size: int = 1, batch: int = 64, show: bool = True) -> None:
        """Encode every missing shard whose number is `rank` modulo `size`."""
        missing = [
            (split, number)
            for split in SPLITS
            for number in range(-(-len(self.splits[split]) // self.shard))
            if number % size == rank and not (self.folder / name_shard(split, number)).exists()
        ]
        total = sum(len(self._select_rows(split, number)) * self._count_views(split) for split, number in missing)
        owner = read_owner(self.folder / "cache.json")
        with tqdm(total=total, desc="encoding", unit="image", disable=not show) as bar:
            for split, number in missing:
                tensors = self._encode_rows(split, self._select_rows(split, number), batch, bar)
                path = self.folder / name_shard(split, number)
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
        captions: list[tuple[str, ...]] = []
        for view in range(self._count_views(split)):
            encoded: dict[str, list[Tensor]] = {}
            for start in range(rows.start, rows.stop, batch):
                indices = range(start, min(start + batch, rows.stop))
                positions = [view * count + i for i in indices] if split == "train" else None
                images = examples.fetch(indices, positions)
                self.unreadable.update(dict.fromkeys(images.get("unreadable", ())))
                check_unreadable(list(self.unreadable), count, self.max_unreadable)
                captions += images.get("captions", ()) if view == 0 else ()
                for name, tensor in self._encode_batch(images).items():
                    encoded.setdefault(name, []).append(tensor.cpu())
                bar.update(len(indices))
            views.append({name: torch.cat(batches) for name, batches in encoded.items()})
        tensors = {n: torch.stack([v[n] for v in views], dim=1) for n in views[0] if n != "labels"}
        text = encode_captions(captions, self.text_encoder) if captions else {}
        return tensors | {"labels": views[0]["labels"]} | text

    def _encode_batch(self, images: Batch) -> dict[str, Tensor]:
        """Tokens, labels and, where they are asked for, features and control pictures."""
        dtype = choose_token_dtype(self.tokenizer.config.vocab_size)
        image_B3HW = scale_to_unit(images["image"].to(self.tokenizer.quantizer.codebook.weight.device))
        encoded = {"tokens": self.tokenizer.encode(image_B3HW).to(dtype), "labels": images["label"]}
        if self.encoder is not None:
            encoded["features"] = self.encoder(image_B3HW, self.tokenizer.pyramid.last).half()
        return encoded | pack_control(images["image"], self.control)


def _show_captions(examples: Examples) -> Examples:
    """The examples, with all captions in their batches if they are images that have captions."""
    if isinstance(examples, ImageExamples) and examples.captions is not None:
        return replace(examples, texts=AllCaptions(examples.captions))
    return examples
