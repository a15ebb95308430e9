"""Settings of data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class DataConfig:
    """Which images of a set are used, and how they are cut. Held-out images are resized and centre-cropped."""

    limit: int = 10**9
    """Use at most this many images, chosen at random."""
    held_out: float = 0.02
    """Share of every class kept from training, to measure with; data that comes with a split keeps it."""
    random_crop: bool = False
    """VAR's cut: short side to 1.125 times the size, then a random square; otherwise resized and centre-cropped."""
    flip: bool = False
    """Mirror half of the images."""
    max_unreadable: float = 0.1
    """Share of unreadable images at which a run stops; below it they are named and passed over."""

    def __post_init__(self) -> None:
        rules = {
            "limit must be 1 or more": self.limit >= 1,
            "held_out must lie between 0 and 1": 0 < self.held_out < 1,
            "max_unreadable must lie in 0 to 1": 0 <= self.max_unreadable <= 1,
        }
        check_fields("data", self, rules)
