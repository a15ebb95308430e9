"""Intervals and differences over seeds in the results of an experiment."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.research.experiments.entry import load_experiment
from nextscale.research.experiments.folders import Inputs
from nextscale.research.experiments.intervals import (
    RESAMPLES,
    compute_t_quantile,
    resample_deviations,
    summarize_differences,
    summarize_seeds,
)
from nextscale.research.experiments.report import format_table, write_results

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 31, 200])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_quantiles_equal_scipy_s(freedom, level):
    expected = scipy.stats.t.ppf((1 + level) / 2, freedom)
    assert compute_t_quantile(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_intervals_equal_scipy_s():
    values, reference = np.random.default_rng(0).normal(5, 1, (2, 5)).tolist()
    summary = summarize_seeds(values)
    expected = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert summary["interval"] == pytest.approx(list(expected))
    difference = np.subtract(values, reference)
    expected = scipy.stats.t.interval(0.95, 4, difference.mean(), scipy.stats.sem(difference))
    assert summarize_differences(values, reference)["interval"] == pytest.approx(list(expected))
    assert "interval" not in summarize_seeds([3.0])
    assert "interval" not in summarize_seeds([3.0, math.nan])
    assert summarize_seeds([3.0, 3.0])["interval"] == [3.0, 3.0]


def test_deviations_over_resamples_equal_a_loop_and_the_formula():
    values = np.random.default_rng(3).normal(2, 0.5, (200, 3)) * [1, 2, 4]
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [values[i] for i in rng.integers(200, size=200)]
        means.append([sum(row[m] for row in drawn) / 200 for m in range(3)])
    found = resample_deviations(values)
    assert found == pytest.approx([statistics.stdev(column) for column in zip(*means, strict=True)])
    assert found == pytest.approx(values.std(axis=0) / math.sqrt(200), rel=0.1)


def write(experiment, values, folder):
    inputs = Inputs("digits", "train", "train", "digits")
    return write_results(experiment, inputs, values, folder, World())


def test_rows_are_compared_with_a_reference_seed_by_seed(tmp_path):
    experiment = load_experiment("mepa-load", "tiny", on_cpu=True)
    values = {
        "SMoE": [{"validation_loss": 5.0, "load_variance": 2.0}, {"validation_loss": 6.0, "load_variance": 2.0}],
        "STMoE": [{"validation_loss": 4.5, "load_variance": 2.0}, {"validation_loss": 5.75, "load_variance": 2.0}],
    }
    results = write(experiment, values, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["against_row"] == "SMoE"
    first, second = results["rows"]
    assert first["differences"] == {}
    difference = second["differences"]["validation_loss"]
    assert difference["values"] == [-0.5, -0.25]
    half = 12.706204736 * 0.125  # two seeds: t of one degree of freedom times the deviation over the root of two
    assert difference["interval"] == pytest.approx([-0.375 - half, -0.375 + half])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "Differences from SMoE by equal seeds, and their 95 % intervals:" in lines
    at = lines.index("Differences from SMoE by equal seeds, and their 95 % intervals:")
    assert lines[at + 2] == "|  | validation_loss |", "what is equal for all seeds has no interval"
    assert lines[at + 4] == "| STMoE | -0.375 (-1.963 to 1.213) |"
    assert "| SMoE | -0.8531 to 11.85 |" in lines


def test_a_reference_that_is_not_measured_is_named():
    from dataclasses import replace

    experiment = load_experiment("mepa-results", "tiny")
    assert experiment.find_reference().measured
    with pytest.raises(UserError, match="mepa-results at scale tiny measures no row 'BigGAN'"):
        replace(experiment, against_row="BigGAN").find_reference()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_of_earlier_versions_are_read(path):
    results = json.loads(path.read_text())
    if "experiment" in results and "figures" in results:
        table = format_table(results)
        assert table.startswith(f"# {results['title']}\n")
        assert ("95 % intervals" in table) == ("against_row" in results)
