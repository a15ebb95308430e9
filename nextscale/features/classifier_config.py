"""Settings of the classifier. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config_dict import check


@dataclass(frozen=True)
class ClassifierConfig:
    """A residual CNN with group norm, so that an image's features do not depend on its batch."""

    image_size: int = 32
    """Side of the square images; others are resized to it."""
    widths: tuple[int, ...] = (64, 128, 192)
    """Channels of the stages; each halves the resolution."""
    groups: int = 16
    """Groups of every norm; must divide all widths."""
    mirror: bool = True
    """Features and scores are means over an image and its mirror image; trained on single images all the same."""

    def __post_init__(self) -> None:
        rules = {
            "widths must be 1 to 8 numbers that groups divides": 1 <= len(self.widths) <= 8
            and self.groups >= 1
            and all(w >= 1 and w % self.groups == 0 for w in self.widths),
            "image_size must be a multiple of 2 for each of the widths": self.image_size >= 8
            and self.image_size % 2 ** len(self.widths) == 0,
        }
        check("classifier", self, rules)
