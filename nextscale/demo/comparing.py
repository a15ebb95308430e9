"""Two models or two settings with equal classes and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import Growth, Request, format_flops, format_seconds, grow
from nextscale.demo.html import draw_table
from nextscale.demo.models import Model, Models

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


def compare_sides(models: Models, a: Side, b: Side, labels: tuple[int | None, ...]) -> Iterator[Grown]:
    """Sample A and then B, yielding what there is after each scale.

    `labels`: of A's classes; B's are those of the same names. UserError when B has no class of a name.
    """
    first, second = models.load(a.source, a.dtype), models.load(b.source, b.dtype)
    theirs = match_labels(first, second, labels)
    growth = None
    for growth in models.iterate(grow(first, Request(labels, a.settings))):
        yield growth, None
    for other in models.iterate(grow(second, Request(theirs, b.settings))):
        yield growth, other


def match_labels(first: Model, second: Model, labels: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The classes of the second model that are called as these of the first; by number where one has no names."""
    if first.config.class_names == second.config.class_names or not first.config.class_names:
        return tuple(second.pipeline.label_indices(list(labels)))
    if not second.config.class_names:
        return tuple(second.pipeline.label_indices(list(labels)))
    return tuple(None if i is None else second.config.find_class(first.config.class_names[i]) for i in labels)


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
