"""Parts of the study: what is chosen for rows, laws of loss against FLOPs, pixels as features."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextscale.common.errors import UserError
from nextscale.encoders.load import load_encoder
from nextscale.research.experiments.choosing import choose_settings, describe_choices, note_divergence
from nextscale.research.experiments.entry import Choice, load_experiment
from nextscale.research.experiments.folders import Folders
from nextscale.research.experiments.run import list_jobs, resolve_inputs
from nextscale.research.experiments.scaling import fit_family, fit_power_law, format_scaling

VALUES = (1e-3, 2e-3, 4e-3)


@pytest.fixture
def study(tmp_path):
    """The study at scale tiny, with three values, two seeds to choose by, and its folders."""
    experiment = load_experiment("study", "tiny", on_cpu=True)
    experiment = replace(experiment, choice=Choice({"run.train.learning_rate": VALUES}, (100, 101)))
    return experiment, Folders(experiment, resolve_inputs(experiment, {}), tmp_path / "tiny")


def finish(study, losses):
    """Finish the candidates: {row: [[loss of each seed] for each value]}; None diverged."""
    experiment, folders = study
    for row in experiment.rows:
        for value, of_seeds in zip(VALUES, losses.get(row.name, []), strict=False):
            changed = experiment.choice.apply(row, {"run.train.learning_rate": value})
            for seed, loss in zip(experiment.choice.seeds, of_seeds, strict=True):
                folder = folders.plan_training(changed, seed)[1]
                folder.mkdir(parents=True)
                if loss is None:
                    note_divergence(folder, UserError("not finite"))
                else:
                    (folder / "finished.json").write_text(json.dumps({"validation_loss": loss}))


def test_the_lowest_mean_loss_is_chosen_for_each_row(study):
    experiment, folders = study
    dense, pixels, shuffled = (row.name for row in experiment.rows)
    losses = {dense: [[3.0, 3.2], [3.1, 3.0], [None, 2.0]], pixels: [[3.0, 3.0], [2.9, 3.2], [2.5, 2.5]]}
    finish(study, losses | {shuffled: [[3.0, 3.0]]})
    changed, found = choose_settings(experiment, folders)
    assert [row.run.train.learning_rate for row in changed.rows[:2]] == [2e-3, 4e-3]
    assert set(found) == {dense, pixels}, "of the third one not all candidates are trained"
    assert changed.rows[2] == experiment.rows[2]
    described = describe_choices(found, (100, 101))
    assert json.loads(json.dumps(described))[dense] == {
        "settings": {"run.train.learning_rate": 2e-3},
        "seeds": [100, 101],
        "candidates": [
            {"settings": {"run.train.learning_rate": value}, "losses": of_seeds}
            for value, of_seeds in zip(VALUES, losses[dense], strict=True)
        ],
    }
    jobs = list_jobs(experiment, folders.inputs, folders.root.parent)
    assert len(jobs) == 3 * 3 * 2 + 3 * 2
    assert [job.row for job in jobs if not job.known] == [shuffled] * 2, "its settings are not chosen yet"


def test_values_may_be_chosen_by_the_first_row(study):
    experiment, folders = study
    experiment = replace(experiment, choice=replace(experiment.choice, of_first_row=True))
    finish((experiment, folders), {experiment.rows[0].name: [[3.0, 3.2], [3.1, 3.2], [2.0, 2.0]]})
    changed, found = choose_settings(experiment, folders)
    assert {row.run.train.learning_rate for row in changed.rows} == {4e-3}
    assert len(found) == 3


def test_a_row_that_always_diverges_is_named(study):
    finish(study, {"dense": [[None, None], [None, 1.0], [None, None]]})
    with pytest.raises(UserError, match="row dense: the training diverged with all values to choose from"):
        choose_settings(*study)


def test_choices_of_other_settings_and_wrong_ones(study):
    experiment, _ = study
    choice = Choice({"run.train.clip": (1.0, 2.0), "run.transformer.depth": (1, 2)}, (100,))
    rows = [choice.apply(experiment.rows[0], settings).run for settings in choice.list_settings()]
    assert [(run.train.clip, run.transformer.depth) for run in rows] == [(1.0, 1), (1.0, 2), (2.0, 1), (2.0, 2)]
    with pytest.raises(UserError, match="learning_rat"):
        Choice({"run.train.learning_rat": (1.0,)}, (100,)).apply(experiment.rows[0], {"run.train.learning_rat": 1.0})
    with pytest.raises(UserError, match="study chooses settings of its trainings: it takes no --model"):
        resolve_inputs(replace(experiment, rows=experiment.rows[:1]), {"model": "m"})


def test_a_power_law_is_found_with_the_uncertainty_of_seeds():
    flops = np.array([1e12, 4e12, 2e13])
    factor, exponent = fit_power_law(flops, 7.0 * flops**-0.04)
    assert (factor, exponent) == pytest.approx((7.0, 0.04))
    rng = np.random.default_rng(1)
    sizes = [(x, (7.0 * x**-0.04 * np.exp(rng.normal(0, 0.01, 5))).tolist()) for x in flops]
    fit = fit_family("dense", sizes, 1e20)
    low, high = fit["exponent_interval"]
    assert low < fit["exponent"] < high
    assert low < 0.04 < high
    least, most = fit["predicted_loss_interval"]
    assert least < fit["predicted_loss"] < most
    assert fit == fit_family("dense", sizes, 1e20)
    exact = fit_family("dense", [(x, [7.0 * x**-0.04] * 3) for x in flops], 1e20)
    assert exact["exponent_interval"] == pytest.approx([0.04, 0.04])
    assert exact["predicted_loss"] == pytest.approx(7.0 * 1e20**-0.04)
    report = {"target": "var-d16", "note": "predictions", "families": {"dense": exact}}
    assert "| dense | 0.0400 (0.0400 to 0.0400) |" in "\n".join(format_scaling(report))
    with pytest.raises(UserError, match="dense has one size"):
        fit_family("dense", sizes[:1], 1e20)


def test_pixels_are_features():
    image = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = load_encoder("pixels")(image, (2, 3))
    assert features.shape == (2, 2, 3, 48)
    for i, j in ((0, 0), (1, 2)):
        cell = image[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1)
        torch.testing.assert_close(features[:, i, j], cell, rtol=0, atol=1e-6)
    assert math.prod(load_encoder("pixels").grid) == 64
