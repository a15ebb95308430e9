"""The Pareto front of an experiment: rows that no other row beats in both a cost and a metric. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nextscale.research.experiments.figures import is_higher_better


def find_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (x, y) that no other point beats: none is as low in both or lower, and lower in one.

    Equal points stand together; a point that is not finite is left out.
    """
    finite = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    return [
        name
        for name, (x, y) in finite.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in finite.values())
    ]


def list_fronts(x: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, list[str]]:
    """For each metric the names of the rows on the front of its mean and that of `x`, of which less is better.

    `rows`: of results.json; those that lack a figure are left out.
    """
    fronts = {}
    for metric in metrics:
        sign = -1 if is_higher_better(metric) else 1
        measured = {row["name"]: row["figures"] for row in rows if {x, metric} <= row["figures"].keys()}
        points = {name: (found[x]["mean"], sign * found[metric]["mean"]) for name, found in measured.items()}
        if points:
            fronts[metric] = find_front(points)
    return fronts
