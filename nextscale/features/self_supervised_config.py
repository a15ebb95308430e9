"""Settings of the self-supervised encoder. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config_dict import check


@dataclass(frozen=True)
class EncoderConfig:
    """A residual CNN with group norm, so that an image's features do not depend on its batch."""

    image_size: int = 32
    """Side of the square images that it is trained on."""
    widths: tuple[int, ...] = (64, 128)
    """Channels of the stages; each halves the resolution, and the last one's are the features' width."""
    blocks: tuple[int, ...] = (1, 2)
    """Residual convolutions of each stage."""
    groups: int = 16
    """Groups of every norm; must divide all widths."""

    def __post_init__(self) -> None:
        rules = {
            "widths must be 1 to 8 numbers that groups divides": 1 <= len(self.widths) <= 8
            and self.groups >= 1
            and all(w >= 1 and w % self.groups == 0 for w in self.widths),
            "blocks must be one number of 0 or more for each of the widths": len(self.blocks) == len(self.widths)
            and min(self.blocks) >= 0,
            "image_size must be a multiple of 2 for each of the widths": self.image_size >= 8
            and self.image_size % self.patch == 0,
        }
        check("encoder", self, rules)

    @property
    def patch(self) -> int:
        """Pixels per cell of the last map, along each side."""
        return int(2 ** len(self.widths))
