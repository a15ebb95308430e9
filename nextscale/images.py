"""What the pipeline returns: generated or reconstructed images, which can be saved, shown and animated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from nextscale.common.animation import Animation


@dataclass(frozen=True, repr=False)
class Images:
    """Images and the tokens they were decoded from. A notebook shows them as one captioned grid."""

    tokens: Tensor
    """int64 (B, L), all scales, coarse to fine."""
    tensor: Tensor
    """float32 (B, 3, H, W) in [0, 1]."""
    captions: tuple[str, ...]
    growth: tuple[Tensor, ...] = field(default=(), kw_only=True)
    """As `tensor`, after each scale, coarse to fine; the last is `tensor`. Empty unless `sample` was asked for it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        height, width = self.tensor.shape[2:]
        shown = ", ".join(filter(None, self.captions[:8])) + (", ..." if len(self) > 8 else "")
        count = "1 image" if len(self) == 1 else f"{len(self)} images"
        return f"Images({count} of {width}x{height}, {self.tokens.shape[1]} tokens each{shown and ': ' + shown})"

    def pil(self) -> list[Image]:
        """The images as 8-bit RGB PIL images."""
        from nextscale.common.pictures import to_pil

        return to_pil(self.tensor)

    def grid(self, columns: int = 0) -> Image:
        """All images as one captioned grid of so many columns; 0: about as many as rows."""
        from nextscale.common.pictures import tile_images

        return tile_images(self.pil(), self.captions, columns)

    def animate(self, columns: int = 0) -> Animation:
        """How the images grow scale by scale, as an animated `grid`. UserError unless they were sampled with growth."""
        from nextscale.common.animation import Animation
        from nextscale.common.errors import UserError
        from nextscale.common.pictures import tile_images, to_pil

        if not self.growth:
            raise UserError("only images that were sampled with growth=True can be animated")
        return Animation(tuple(tile_images(to_pil(images), self.captions, columns) for images in self.growth))

    def save(self, path: str | Path) -> None:
        """Write all images as one captioned grid; as an animation where they have `growth` and the suffix is .gif or
        .webp."""
        from nextscale.common.animation import is_animated
        from nextscale.common.pictures import save_image

        if self.growth and is_animated(path):
            self.animate().save(path)
        else:
            save_image(self.grid(), Path(path))

    def _repr_png_(self) -> bytes:
        from nextscale.common.pictures import encode_png

        return encode_png(self.grid())
