"""Settings of the condition: what an image is generated from. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from nextscale.common.errors import UserError
from nextscale.common.registry import CONDITIONS
from nextscale.config.parse import check_fields

_SEQUENCES = ("text", "picture")
"""Kinds that give a sequence for cross-attention."""
GIVEN = ("prompts", "control", "vectors", "negative_prompts")
"""Keywords of `Pipeline.sample` for what images are generated from, beside labels."""
OTHERS = ("text", "vector", "picture", "combined")
"""Kinds that take other values than a label."""
_SOURCES = {"class": "label", "text": "text", "vector": "vector", "picture": "control"}
"""The field of a training batch that holds the values, by the kind."""


@dataclass(frozen=True)
class ConditionConfig:
    """What an image is conditioned on."""

    kind: str = "class"
    """class: a class label. text: a caption. vector: an embedding. picture: a control picture, such as edges. combined:
    several of these, its `parts`. Or the name of a condition that you registered."""
    num_classes: int = 1000
    """class: number of classes. Training takes it from the data."""
    source: str = ""
    """Field of a training batch with the values; empty: label, text, vector, control or the name of `control`."""
    max_tokens: int = 64
    """text: length of the sequence. Longer captions are cut. Our own encoder has a token for each byte of UTF-8."""
    layers: int = 2
    """picture, and text without embedding_width: layers of our own encoder, which is trained with the transformer."""
    embedding_width: int = 0
    """text: width of a frozen text encoder's embeddings; 0 = our own encoder of bytes. vector: width of the vector."""
    picture_size: tuple[int, ...] = ()
    """picture: height and width in pixels. Training takes the size of the images."""
    control: Literal["", "edges", "low-resolution"] = ""
    """picture: what is computed from the training images as control pictures; empty: those of the data (`source`)."""
    channels: int = 1
    """picture of the data: 1 for a mask, 3 for colours."""
    patch: int = 4
    """picture: side of the square patches in pixels, each a token of the sequence."""
    parts: dict[str, ConditionConfig] = field(default_factory=dict, hash=False)
    """combined: the conditions, by names of your own. Their vectors are added, their sequences joined."""
    encoder: str = ""
    """text: folder or hub name of a frozen text encoder; in training cache, the token cache's. Empty = our own."""
    encoder_fingerprint: str = ""
    """Of the frozen text encoder; training sets it."""

    def __post_init__(self) -> None:
        CONDITIONS.check(self.kind, "condition.kind")
        size = tuple(self.picture_size)
        rules = {
            "num_classes must be 1 to 2^24": 1 <= self.num_classes <= 2**24,
            "max_tokens must be 2 to 4096": 2 <= self.max_tokens <= 4096,
            "layers must be 0 to 100": 0 <= self.layers <= 100,
            "embedding_width must be 0 to 2^20": 0 <= self.embedding_width <= 2**20,
            "encoder must be empty unless the kind is text": self.kind == "text" or not self.encoder,
            "embedding_width must be given for a vector": self.kind != "vector" or self.embedding_width > 0,
            "picture_size must be height and width": len(size) in (0, 2) and all(1 <= side <= 2**16 for side in size),
            "channels must be 1 or 3": self.channels in (1, 3),
            "patch must be 1 to 1024": 1 <= self.patch <= 1024,
            "patch must divide picture_size": all(side % self.patch == 0 for side in size),
            "parts must be given for combined, and for no other kind": bool(self.parts) == (self.kind == "combined"),
            "parts must not be combined": all(part.kind != "combined" for part in self.parts.values()),
            "parts must have names of letters, digits, - and _": all(
                name.replace("-", "_").isidentifier() for name in self.parts
            ),
        }
        check_fields("condition", self, rules)

    @property
    def picture_channels(self) -> int:
        """Channels of a control picture."""
        return {"edges": 1, "low-resolution": 3}.get(self.control, self.channels)

    @property
    def batch_field(self) -> str:
        """The field of a training batch with the values."""
        return self.source or (self.control if self.kind == "picture" else "") or _SOURCES.get(self.kind, "label")

    @property
    def count_of_classes(self) -> int | None:
        """Number of the classes that a user names; None where images are not conditioned on the classes of the data."""
        counts = [p.num_classes for p in self.list_parts().values() if p.kind == "class" and p.takes_labels]
        return counts[0] if counts else None

    @property
    def takes_labels(self) -> bool:
        """Whether the labels of a data set are values of this condition or of a part of it."""
        return any(p.kind not in OTHERS and p.batch_field == "label" for p in self.list_parts().values())

    @property
    def gives_sequence(self) -> bool | None:
        """Whether there is a sequence for cross-attention; None where only a class that you registered knows."""
        kinds = {part.kind for part in self.list_parts().values()}
        return True if kinds & {*_SEQUENCES} else None if kinds - {*_SOURCES} else False

    def list_parts(self) -> dict[str, ConditionConfig]:
        """The parts by name; of a condition that is not combined itself, by its kind."""
        return self.parts or {self.kind: self}

    def fit(self, classes: int, size: tuple[int, int]) -> ConditionConfig:
        """The condition for data with this many classes and images of this height and width."""
        parts = {name: part.fit(classes, size) for name, part in self.parts.items()}
        count = classes if self.takes_labels and not self.parts else self.num_classes
        own_size = size if self.kind == "picture" and not self.picture_size else self.picture_size
        return dataclasses.replace(self, parts=parts, num_classes=count, picture_size=own_size)

    def describe(self) -> str:
        """What the images are generated from, in words."""
        if self.kind == "class":
            return f"{self.num_classes} classes"
        if self.kind == "combined":
            return " and ".join(part.describe() for part in self.parts.values())
        words = {
            "text": f"captions of up to {self.max_tokens} tokens",
            "vector": f"vectors of width {self.embedding_width}",
            "picture": f"control pictures of {' x '.join(map(str, self.picture_size or ('any',)))} pixels",
        }
        return words.get(self.kind, f"condition {self.kind}")

    def require_classes(self, purpose: str) -> int:
        """The number of classes, for what draws images by their class; UserError where there are none."""
        if self.kind in OTHERS:
            raise UserError(f"{purpose} by their class, and this model's images are conditioned on {self.describe()}")
        return self.num_classes


def take_given(keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of `GIVEN`, which are removed from the keywords of a call."""
    return {name: keywords.pop(name) for name in GIVEN if name in keywords}
