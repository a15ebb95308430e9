"""Captions in batches: as bytes for a text encoder that is trained along, or as embeddings from a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.common.text import cut_text
from nextscale.config.condition import ConditionConfig
from nextscale.config.parse import check_fields
from nextscale.data.examples import Batch, MemoryExamples
from nextscale.data.sources.captions import Captions


@dataclass(frozen=True)
class TextInput:
    """What a model with a text condition takes from its data."""

    kind: Literal["bytes", "embeddings"]
    """bytes: the caption in UTF-8. embeddings: what a text encoder made of it, from a token cache."""
    max_tokens: int = 0
    """Length T of the sequence in a batch. Longer captions are cut. 0 = that of the cache (embeddings)."""

    def __post_init__(self) -> None:
        rule = "max_tokens must be 1 to 65536"
        check_fields("text", self, {rule: (self.kind == "bytes") <= self.max_tokens <= 65536})

    @staticmethod
    def of_condition(condition: ConditionConfig) -> TextInput | None:
        """What a model with this condition takes; None where it reads no captions."""
        parts = list_caption_parts(condition)
        if not parts:
            return None
        frozen = [reads_embeddings(part) for part in parts]
        if any(frozen) != all(frozen):
            raise UserError(
                "transformer.condition reads captions as bytes and as embeddings: give all texts an encoder, or none"
            )
        first_token = 1  # every sequence begins with a learned one
        return (
            TextInput("embeddings")
            if any(frozen)
            else TextInput("bytes", max(part.max_tokens for part in parts) - first_token)
        )


def list_caption_parts(condition: ConditionConfig) -> list[ConditionConfig]:
    """The parts of a condition that read the captions of a data set."""
    return [part for part in condition.list_parts().values() if part.kind == "text" and part.batch_field == "text"]


def reads_embeddings(text: ConditionConfig) -> bool:
    """Whether a text condition reads the embeddings of a frozen encoder."""
    return bool(text.encoder or text.embedding_width)


class TextBatches(Protocol):
    """What examples add to a batch of images."""

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """Of the images with these numbers; `positions` as in `Examples.fetch`."""


@dataclass(frozen=True)
class CaptionBytes:
    """One caption of each image, as bytes."""

    captions: Captions
    max_bytes: int
    seed: int

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """The captions as `pack_bytes` gives them. In training one of an image's captions is drawn, in validation it is
        the first."""
        counts = self.captions.count_N[list(indices)].tolist()
        chosen = choose_captions(self.seed, positions, counts)
        texts = [self.captions.encode(i, n) for i, n in zip(indices, chosen, strict=True)]
        return pack_bytes(texts, self.max_bytes)


class CaptionedExamples(MemoryExamples):
    """Examples in memory, as rows of tensors and what `texts` reads of the captions."""

    def __init__(self, texts: TextBatches, **tensors: Tensor):
        super().__init__(**tensors)
        self.texts = texts

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        return super().fetch(indices, positions) | fetch_text(self.texts, indices, positions)


@dataclass(frozen=True)
class AllCaptions:
    """All captions of each image, for the writer of a token cache."""

    captions: Captions

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """`captions`: a tuple of texts for each image."""
        return {"captions": [self.captions[i] for i in indices]}


def choose_captions(seed: int, positions: Sequence[int] | None, counts: Sequence[int]) -> list[int]:
    """Which of its captions each image shows: drawn for its position in the run, the first one without positions.

    `counts`: captions of each image, 1 or more.
    """
    if positions is None:
        return [0] * len(counts)
    return [
        int(torch.randint(count, (), generator=make_generator(seed, "caption", position))) if count > 1 else 0
        for position, count in zip(positions, counts, strict=True)
    ]


def pack_bytes(texts: Sequence[bytes], max_bytes: int) -> dict[str, Tensor]:
    """Texts in UTF-8 as `text`, uint8 (B, max_bytes), padded with zeros, and `text_length`, int64 (B,).

    Longer ones are cut before the first character that does not fit as a whole.
    """
    text_BT = torch.zeros(len(texts), max_bytes, dtype=torch.uint8)
    cut = [cut_text(text, max_bytes) for text in texts]
    for row_T, text in zip(text_BT, cut, strict=True):
        if text:
            row_T[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {"text": text_BT, "text_length": torch.tensor([len(text) for text in cut], dtype=torch.int64)}


def list_caption_notes(lengths: Sequence[Tensor], images: int, text: TextInput | None = None) -> list[str]:
    """A line on the number of captions, and one on those that are cut because they have too many bytes for `text`.

    `lengths`: bytes of the captions of each part of a set of so many images.
    """
    length_C = torch.cat([*lengths])
    count = int((length_C > 0).sum())
    notes = [f"{count} captions of {images} images"]
    if text is None or text.kind != "bytes":
        return notes
    if cut := int((length_C > text.max_tokens).sum()):
        notes.append(
            f"{cut} of {count} captions have more than {text.max_tokens} bytes, up to {int(length_C.max())}: they are "
            "cut"
        )
    return notes


def fetch_text(texts: TextBatches | None, indices: Any, positions: Sequence[int] | None) -> Batch:
    """What `texts` gives for a batch; nothing without it."""
    return texts.fetch([int(i) for i in indices], positions) if texts is not None else {}
