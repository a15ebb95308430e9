"""Captions and their embeddings in the shards of a token cache.

A shard of a cache with captions holds, besides its tokens,

    caption_bytes    uint8 (bytes of all captions,)        in UTF-8, one after the other
    caption_length   int32 (captions,)                     bytes of each
    caption_count    int32 (n,)                            captions of each image, 1 or more

and with a text encoder, whose embeddings of a caption are as many rows as it has tokens,

    text             float16 (tokens of all captions, E)
    text_length      int32 (captions,)                     tokens of each
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextscale.checkpoints.shards import Form
from nextscale.common.errors import UserError
from nextscale.data.cache_head import TextHead
from nextscale.data.captions import TextInput, choose_captions, pack_bytes
from nextscale.data.examples import Batch
from nextscale.data.sources.captions import Captions
from nextscale.encoders.text import TextEncoder, pad_sequences

TEXT_TENSORS = ("caption_bytes", "caption_length", "caption_count", "text", "text_length")


def list_text_forms(head: TextHead | None, rows: int) -> dict[str, Form]:
    """Dtype and shape of the tensors above, of a shard with so many images."""
    if head is None:
        return {}
    forms: dict[str, Form] = {
        "caption_bytes": ([torch.uint8], (None,)),
        "caption_length": ([torch.int32], (None,)),
        "caption_count": ([torch.int32], (rows,)),
    }
    if head.encoder:
        forms |= {"text": ([torch.float16], (None, head.width)), "text_length": ([torch.int32], (None,))}
    return forms


def encode_captions(captions: Sequence[Sequence[str]], encoder: TextEncoder | None) -> dict[str, Tensor]:
    """The tensors above of the captions of n images. Equal captions are encoded once."""
    packed = Captions.from_lists(captions)
    tensors = {
        "caption_bytes": torch.from_numpy(packed.text_U.copy()),
        "caption_length": torch.from_numpy(packed.length_C.astype(np.int32)),
        "caption_count": torch.from_numpy(packed.count_N.astype(np.int32)),
    }
    if encoder is None:
        return tensors
    texts = [text for i in range(len(packed)) for text in packed[i]]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    encoded = encoder.encode(list(number))
    rows = [encoded[number[text]] for text in texts]
    tensors |= {"text": torch.cat(rows), "text_length": torch.tensor([len(row) for row in rows], dtype=torch.int32)}
    return tensors


def check_text(path: Path, shard: dict[str, Tensor], head: TextHead | None, remedy: str) -> None:
    """Raise UserError when the lengths and counts of a shard do not fit its captions and embeddings."""
    if head is None:
        return
    counts, captions = shard["caption_count"], len(shard["caption_length"])
    rules = {
        "caption_count": (counts.min() >= 1 and counts.sum() == captions) if len(counts) else captions == 0,
        "caption_length": _fits(shard["caption_length"], len(shard["caption_bytes"]), None),
    }
    if head.encoder:
        fits = len(shard["text_length"]) == captions
        rules["text_length"] = fits and _fits(shard["text_length"], len(shard["text"]), head.max_tokens)
    for name, holds in rules.items():
        if not holds:
            raise UserError(f"{path} is damaged: {name} does not fit the captions; {remedy}")
    try:
        bytes(shard["caption_bytes"].numpy()).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: the captions are no UTF-8; {remedy}") from None


def _fits(lengths: Tensor, total: int, largest: int | None) -> bool:
    """Whether lengths are 0 to `largest` and sum to `total`."""
    if not len(lengths):
        return total == 0
    in_range = lengths.min() >= 0 and (largest is None or lengths.max() <= largest)
    return bool(in_range and lengths.sum() == total)


class ShardText:
    """The captions of a shard."""

    def __init__(self, shard: dict[str, Tensor]):
        names = "caption_bytes", "caption_length", "caption_count"
        self.captions = Captions(*(shard[name].numpy() for name in names))
        self.shard = shard
        if "text" in shard:
            self.stop_C = shard["text_length"].numpy().cumsum()

    def read_sequence(self, row: int, n: int) -> Tensor:
        """Embeddings (tokens, E) of caption n of an image."""
        caption = int(self.captions.first_N[row]) + n
        stop = int(self.stop_C[caption])
        return self.shard["text"][stop - int(self.shard["text_length"][caption]) : stop]


def collect_text(
    places: Sequence[tuple[ShardText, int]], text: TextInput, seed: int, positions: Sequence[int] | None
) -> Batch:
    """One caption of each image, as `text` says.

    bytes: as `CaptionBytes.fetch`. embeddings: `text` float16 (B, T, E), padded with zeros, and `text_length` int64
    (B,). `places`: the shard of each image, and its row there.
    """
    counts = [int(shard.captions.count_N[row]) for shard, row in places]
    chosen = [(shard, row, n) for (shard, row), n in zip(places, choose_captions(seed, positions, counts), strict=True)]
    if text.kind == "bytes":
        return pack_bytes([shard.captions.encode(row, n) for shard, row, n in chosen], text.max_tokens)
    text_BTE, length_B = pad_sequences([shard.read_sequence(row, n) for shard, row, n in chosen], text.max_tokens)
    return {"text": text_BTE, "text_length": length_B}


def join_captions(shards: Sequence[ShardText]) -> Captions:
    """The captions of several shards."""
    parts = [shard.captions for shard in shards]
    return Captions(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("text_U", "length_C", "count_N")))
