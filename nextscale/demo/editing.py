"""Masks for repainting a part of a picture: drawn on it, or one of its halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.data.images import ImageLike, load_image
from nextscale.demo.models import Asked, Model

DRAWN, ALL = "What I draw", "Everything"
_PARTS = {
    "Left half": (0.0, 0.0, 0.5, 1.0),
    "Right half": (0.5, 0.0, 1.0, 1.0),
    "Upper half": (0.0, 0.0, 1.0, 0.5),
    "Lower half": (0.0, 0.5, 1.0, 1.0),
    "Centre": (0.25, 0.25, 0.75, 0.75),
    ALL: (0.0, 0.0, 1.0, 1.0),
}
"""Left, top, right and bottom as shares of the sides."""
AREAS = (DRAWN, *_PARTS)
"""What can be repainted."""
_SHOWN = 384
"""Pixels of the longer side at which a picture is drawn on."""


@dataclass(frozen=True)
class Edited:
    """A picture before and after, both in the model's size."""

    before: Image.Image
    after: Image.Image
    repainted: float
    """The share of the picture's area that was repainted."""


def fit_image(model: Model, picture: ImageLike) -> Image.Image:
    """A picture or a file in the model's size: resized on its short side and centre-cropped."""
    return load_image(picture, model.config.image_size)


def enlarge(picture: Image.Image, longest: int = _SHOWN) -> Image.Image:
    """A small picture enlarged by a whole number without smoothing, for drawing on it; a larger one as it is."""
    zoom = max(1, longest // max(picture.size))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def build_mask(size: tuple[int, int], area: str, drawing: Image.Image | None = None) -> Image.Image:
    """The mask of a picture of this (height, width): white stays, black is repainted.

    `drawing`: what was drawn, with transparency where nothing was; of any size. UserError when nothing was drawn.
    """
    height, width = size
    if area in _PARTS:
        left, top, right, bottom = _PARTS[area]
        mask_HW = np.full(size, 255, dtype=np.uint8)
        mask_HW[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 0
        return Image.fromarray(mask_HW)
    if drawing is None or not np.asarray(drawing.convert("RGBA"))[..., 3].any():
        raise UserError("draw on the picture what to repaint, or choose another area")
    opacity = drawing.convert("RGBA").getchannel("A").resize((width, height), Image.Resampling.BOX)
    return Image.fromarray(np.where(np.asarray(opacity) >= 128, 0, 255).astype(np.uint8))


def repaint(model: Model, picture: Image.Image, mask: Image.Image, asked: Asked, settings: SampleConfig) -> Edited:
    """Generate the black part of the mask anew, as `Pipeline.edit`. `picture` and `mask` are of the model's size.

    `asked`: the class or the text of what is generated.
    """
    given: dict[str, Any] = model.give([asked]) if model.reads_text else {"label": asked}
    after = model.pipeline.edit(picture, mask, config=settings, **given).pil()[0]
    return Edited(picture, after, float((np.asarray(mask) < 128).mean()))
