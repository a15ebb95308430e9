"""Pictures that appear scale by scale, with what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from nextscale.common.devices import synchronize
from nextscale.common.errors import UserError
from nextscale.common.pictures import save_image, tile_images, to_pil
from nextscale.config.sampling import SampleConfig
from nextscale.demo.models import Asked, Model
from nextscale.evaluation.flops import FlopCounter, count_dense_flops
from nextscale.research.analysis.analyzed_model import name_scales
from nextscale.sampling.sampler import check_finite

MOST_PICTURES = 32
"""Pictures of one request: more would fill a page and, of a large model, a memory."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for."""

    asked: tuple[Asked, ...]
    """The class or the text of each picture, None for neither."""
    settings: SampleConfig

    def __post_init__(self) -> None:
        if not self.asked:
            raise UserError("choose at least one class, or write at least one text")
        if len(self.asked) > MOST_PICTURES:
            raise UserError(f"at most {MOST_PICTURES} pictures at once; this asks for {len(self.asked)}")


@dataclass(frozen=True, eq=False)
class Growth:
    """The pictures of a request so far."""

    model: Model
    request: Request
    scales: tuple[tuple[Image.Image, ...], ...]
    """For each scale that is done, the pictures up to it."""
    seconds: float
    """Of the transformer so far and, once, of the decoder; without the pictures that are drawn on the way."""
    flops: float
    """Of the transformer so far, for one picture."""

    @property
    def captions(self) -> list[str]:
        """The class or the text of each picture."""
        return [self.model.caption(value) for value in self.request.asked]

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The pictures up to the last scale that is done."""
        return self.scales[-1]

    @property
    def done(self) -> bool:
        """Whether all scales are done."""
        return len(self.scales) == len(self.model.config.pyramid)

    @property
    def images_per_second(self) -> float:
        return len(self.request.asked) / max(self.seconds, 1e-9)

    def describe(self) -> str:
        """What it cost so far, in words."""
        names = name_scales(self.model.config.pyramid)
        at = f"scale {len(self.scales)} of {len(names)} ({names[len(self.scales) - 1]})"
        if not self.done:
            return f"{at} ... {format_seconds(self.seconds)}"
        share = self.flops / count_dense_flops(self.model.config, self.request.settings)
        parts = [
            f"{format_seconds(self.seconds)} for {count_pictures(len(self.request.asked))}",
            f"{self.images_per_second:.3g} images a second",
            f"{format_flops(self.flops)} an image" + (f", {share:.0%} of the full model's" if share < 0.995 else ""),
        ]
        return "; ".join(parts)

    def write(self, path: Path) -> Path:
        """Write all pictures as one grid with captions, as `nextscale sample --out` does; the path."""
        save_image(tile_images(self.pictures, self.captions), path)
        return path


@torch.no_grad()
def grow(model: Model, request: Request) -> Iterator[Growth]:
    """Sample the request, yielding the pictures after each scale; the last ones are those of `Pipeline.sample`.

    UserError when the settings do not fit the model, and when its logits are not finite.
    """
    pipeline, count, settings = model.pipeline, len(request.asked), request.settings
    counter = FlopCounter(pipeline, settings, count)
    steps = check_finite(pipeline.sample_scales(config=settings, **model.give(request.asked)))
    scales: tuple[tuple[Image.Image, ...], ...] = ()
    transformer, last = 0.0, len(pipeline.config.pyramid) - 1
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        synchronize(pipeline.device)
        transformer += time.perf_counter() - start
        if step is None:  # the check of the logits comes after the last step
            return
        start = time.perf_counter()
        images_B3HW = (pipeline.tokenizer.decode_canvas(step.canvas_BChw) + 1) / 2
        synchronize(pipeline.device)
        decoder = time.perf_counter() - start
        counter.add(step)
        scales = (*scales, tuple(to_pil(images_B3HW)))
        yield Growth(model, request, scales, transformer + decoder * (step.k == last), counter.flops / count)


def count_pictures(count: int) -> str:
    """A number of pictures in words."""
    return "1 picture" if count == 1 else f"{count} pictures"


def format_seconds(seconds: float) -> str:
    """A time in ms or s."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def format_flops(flops: float) -> str:
    """FLOPs in millions, thousands of millions or millions of millions."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"
