"""The Pareto front: by brute force over all pairs, in the results, the table and the picture of an experiment."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nextscale.common.distributed import World
from nextscale.research.experiments.entry import load_experiment
from nextscale.research.experiments.folders import Inputs
from nextscale.research.experiments.front import find_front, list_fronts
from nextscale.research.experiments.report import write_results


@pytest.mark.parametrize("seed", range(20))
def test_no_other_point_beats_those_on_the_front(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 6, (int(rng.integers(1, 25)), 2)).astype(float)  # few values: many are equal
    expected = []
    for i, point in enumerate(points):
        beaten = False
        for other in points:
            as_good, better = (other <= point).all(), (other < point).any()
            beaten = beaten or (as_good and better)
        if not beaten:
            expected.append(str(i))
    assert find_front({str(i): tuple(point) for i, point in enumerate(points.tolist())}) == expected
    assert expected, "one point at least"


def test_points_that_are_not_finite_are_left_out():
    assert find_front({"a": (1.0, math.nan), "b": (2.0, 3.0), "c": (0.0, math.inf)}) == ["b"]


def figure(mean: float) -> dict:
    return {"values": [mean], "mean": mean, "deviation": 0.0}


def test_less_is_better_or_more_as_the_metric_says():
    """A row beats another at equal cost, and one that lacks a figure neither beats nor stands."""
    means = {"cheap": (1, 5.0, 20.0), "same cost": (1, 5.0, 30.0), "dear": (2, 4.0, 10.0), "worse": (2, 6.0, 9.0)}
    rows = [
        {"name": name, "figures": {"gflop": figure(x), "validation_loss": figure(loss), "score": figure(score)}}
        for name, (x, loss, score) in means.items()
    ]
    rows.append({"name": "published alone", "figures": {}})
    fronts = list_fronts("gflop", rows, ["validation_loss", "score", "recall"])
    assert fronts == {"validation_loss": ["cheap", "same cost", "dear"], "score": ["same cost"]}


def test_results_table_and_picture_mark_the_front(tmp_path):
    entry = load_experiment("study", "tiny", on_cpu=True)
    values = {"dense": (1.0, 5.0), "guidance, pixels": (1.0, 4.5), "guidance, shuffled features": (2.0, 4.75)}
    measured = {
        name: [{"gflop": gflop, "validation_loss": loss + 0.01 * seed} for seed in entry.seeds]
        for name, (gflop, loss) in values.items()
    }
    inputs = Inputs("digits", "train", "train", "digits")
    results = write_results(entry, inputs, measured, tmp_path / "marked", World())
    assert json.loads((tmp_path / "marked" / "results.json").read_text()) == results
    assert (results["against"], results["fronts"]) == ("gflop", {"validation_loss": ["guidance, pixels"]})
    table = (tmp_path / "marked" / "table.md").read_text()
    assert "Rows that no other row beats in both gflop and the metric" in table
    assert "\n- validation_loss: guidance, pixels\n" in table
    plain = write_results(replace(entry, against=""), inputs, measured, tmp_path / "plain", World())
    assert "fronts" not in plain
    assert not (tmp_path / "plain" / "curves.png").exists()
    assert Image.open(tmp_path / "marked" / "curves.png").width > 300
