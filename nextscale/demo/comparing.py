"""Two models or two settings with equal classes and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nextscale.common.errors import UserError
from nextscale.config.classes import quote_name
from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import Growth, Request, format_flops, format_seconds, grow
from nextscale.demo.html import draw_table
from nextscale.demo.models import Asked, Model, Models

Grown = tuple[Growth | None, Growth | None]
"""What there is of A and of B."""


@dataclass(frozen=True)
class Side:
    """A or B."""

    source: str
    """The model's folder."""
    dtype: str
    """The type it computes in; empty for that of the page."""
    settings: SampleConfig


def compare_sides(models: Models, source: str, a: Side, b: Side, asked: tuple[Asked, ...]) -> Iterator[Grown]:
    """Sample A and then B, yielding what there is after each scale.

    `asked`: classes of the model `source`; A's and B's are those of the same names. Or texts. UserError when one has no
    class of a name, and when one takes classes and the other texts.
    """
    chosen, first, second = models.load(source), models.load(a.source, a.dtype), models.load(b.source, b.dtype)
    ours = Request(match_asked(chosen, first, asked), a.settings)
    theirs = Request(match_asked(chosen, second, asked), b.settings)
    growth = None
    for growth in models.iterate(grow(first, ours)):
        yield growth, None
    for other in models.iterate(grow(second, theirs)):
        yield growth, other


def match_asked(first: Model, second: Model, asked: tuple[Asked, ...]) -> tuple[Asked, ...]:
    """The classes of the second model that are called as these of the first; by number where one has no names. Texts
    are the same for both."""
    if first.reads_text != second.reads_text:
        text, other = (first, second) if first.reads_text else (second, first)
        raise UserError(f"{text.source} reads texts and {other.source} takes classes: compare two of one kind")
    if first.reads_text:
        return asked
    labels = [None if label is None else int(label) for label in asked]
    ours, theirs = first.config.class_names, second.config.class_names
    if ours == theirs or not ours or not theirs:
        return tuple(second.pipeline.label_indices(labels))
    return tuple(None if i is None else second.config.find_class(quote_name(ours[i])) for i in labels)


def draw_sides(grown: Grown) -> str:
    """The table of what A and B cost so far."""
    heads = ["", "model", "type", "time", "images a second", "FLOPs an image"]
    rows = [
        (
            name,
            [
                growth.model.source, growth.model.dtype, format_seconds(growth.seconds),
                f"{growth.images_per_second:.3g}" if growth.done else "...", format_flops(growth.flops),
            ],
        )
        for name, growth in zip("AB", grown, strict=True)
        if growth is not None
    ]  # fmt: skip
    return draw_table(heads, rows, "Cost with equal seeds")
