"""Settings of data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class ReadConfig:
    """How a data set is read."""

    label_column: str = ""
    """Column with the labels of a table, such as fine_label; of a tar, a suffix or a field of its .json files. Empty =
    label."""
    image_column: str = ""
    """Column with the images of a table, or their file names; of a tar, a suffix. Empty = image or img."""
    caption_column: str = ""
    """Column with the captions of a table, a text or a list of texts; of a tar, a suffix or a field of its .json files.
    Empty = caption, captions or text, or .txt files beside the images. Used by models with a text condition."""
    allow_empty_classes: bool = False
    """Accept classes without images. Otherwise they are an error, because a model would not learn them."""


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    """Which images of a data set are used, and how they are cropped. Held-out images are resized and centre-cropped."""

    limit: int = 10**9
    """Largest number of images to use, drawn at random."""
    held_out: float = 0.02
    """Share of every class that is held out for validation. A data set with a split of its own keeps that."""
    random_crop: bool = False
    """Resize the short side to 1.125 times the image size and crop a random square (VAR). Otherwise resize and
    centre-crop."""
    flip: bool = False
    """Flip half of the images horizontally."""
    max_unreadable: float = 0.1
    """Share of unreadable images above which a run stops. Below it they are reported and skipped."""

    def __post_init__(self) -> None:
        rules = {
            "limit must be 1 or more": self.limit >= 1,
            "held_out must lie between 0 and 1": 0 < self.held_out < 1,
            "max_unreadable must lie in 0 to 1": 0 <= self.max_unreadable <= 1,
        }
        check_fields("data", self, rules)
