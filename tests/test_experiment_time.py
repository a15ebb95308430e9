"""The time of an experiment: a limit to a call, and the estimate of what is left."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.research.experiments.entry import load_experiment
from nextscale.research.experiments.run import format_progress, list_jobs, resolve_inputs
from nextscale.research.experiments.timing import (
    Job,
    Seconds,
    TimeLimit,
    describe_progress,
    limit_time,
    read_seconds,
    record_measuring,
    record_training,
    write_seconds,
)
from nextscale.training.engine.checks import Interrupted
from nextscale.training.engine.loop import train
from tests.conftest import randomised, tiny_config
from tests.test_train import SETTINGS, tasks, weights


def test_a_training_saves_at_the_limit_and_goes_on_to_equal_weights(tmp_path):
    whole, parts = (tasks(randomised(tiny_config()))[0] for _ in range(2))
    train(whole, SETTINGS, tmp_path / "whole")
    normal, folder = parts.forward, tmp_path / "parts"

    def wait_in_step_3(batch, noise, step):
        end = time.monotonic() + 120  # the first interrupt of a training restores what Ctrl-C does
        while step == 3 and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            assert time.monotonic() < end
            time.sleep(0.01)
        return normal(batch, noise, step)

    parts.forward = wait_in_step_3
    handler = signal.getsignal(signal.SIGINT)
    for limit in (0.5, 10, 60):  # on a slow machine it may be over before the training begins
        with pytest.raises(TimeLimit), limit_time(limit):
            train(parts, replace(SETTINGS, save_every=100), folder)
        assert signal.getsignal(signal.SIGINT) is handler
        if list((folder / "training").glob("*.pt")):
            break
    assert list((folder / "training").glob("*.pt")), "the step was ended, and its state saved"
    again = tasks(randomised(tiny_config()))[0]
    train(again, SETTINGS, tmp_path / "parts", accept_changes=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(again)[name], tensor), name


def test_the_limit_interrupts_what_does_not_train_also_where_ctrl_c_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background of a script
    try:
        start = time.monotonic()
        with pytest.raises(TimeLimit), limit_time(0.1):
            time.sleep(60)
        assert time.monotonic() - start < 50
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("tokenizer", 3, 8), UserError("no")])
def test_what_stops_earlier_is_passed_on(stop):
    with pytest.raises(type(stop)), limit_time(60):
        raise stop


def test_times_that_are_none(capsys):
    for given, complaint in (("soon", "--time takes a time such as 90s"), ("0s", "--time must be above 0")):
        assert main(["experiment", "run", "var-guidance", "--time", given]) == 2
        assert complaint in capsys.readouterr().err


def fail_after(seconds: float) -> None:
    time.sleep(seconds)
    raise KeyError


def test_seconds_add_up_over_calls(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), record_training(tmp_path, main=True):
            fail_after(0.02)
    found = read_seconds(tmp_path)
    assert found.training >= 0.04
    for pause in (0.05, 0):
        with record_measuring(tmp_path, "e: a", main=True):
            time.sleep(pause)
    assert read_seconds(tmp_path).measuring["e: a"] >= 0.05, "the second time it is only read"
    assert read_seconds(tmp_path).training == found.training
    with record_training(tmp_path, main=False):
        pass
    assert read_seconds(tmp_path).training == found.training


def finish(folder: Path, training: float, **measuring: float) -> None:
    folder.mkdir()
    (folder / "finished.json").write_text("{}")
    write_seconds(folder, Seconds(training, {f"e: {row}": seconds for row, seconds in measuring.items()}))


def test_what_is_left_is_estimated_by_what_is_done(tmp_path):
    """Two rows with two seeds; a third row shares the trainings of the first."""
    folders = {row: [tmp_path / f"{row}{seed}" for seed in range(2)] for row in "ab"}
    jobs = [Job(row, folders["a" if row == "c" else row][s], f"e: {row}") for s in range(2) for row in "abc"]
    assert describe_progress(jobs) == (
        "0 of 4 trainings are done, 0 of 6 models are measured; the time left is not known before a training is "
        "finished"
    )
    finish(folders["a"][0], 600.0, a=60.0, c=120.0)
    assert "1 of 4 trainings are done, 2 of 6 models are measured" in describe_progress(jobs)
    # three trainings as long as the first, a's and c's measuring as before, b's as their mean
    assert describe_progress(jobs).endswith(
        f"about {(3 * 600 + 60 + 120 + 2 * 90) / 60:.0f} min left, by the time of what is done"
    )
    finish(folders["b"][0], 1200.0, b=30.0)
    folders["a"][1].mkdir()
    write_seconds(folders["a"][1], Seconds(450.0))  # interrupted
    assert f"about {(150 + 1200 + 60 + 120 + 30) / 60:.0f} min left" in describe_progress(jobs)
    finish(folders["b"][1], 1200.0, b=30.0)
    (folders["a"][1] / "finished.json").write_text("{}")
    write_seconds(folders["a"][1], Seconds(600.0, {"e: a": 60.0, "e: c": 120.0}))
    assert describe_progress(jobs) == "4 of 4 trainings are done, 6 of 6 models are measured"


def test_candidates_are_trained_but_not_measured(tmp_path):
    finish(tmp_path / "a", 100.0)
    jobs = [
        Job("r", tmp_path / "a"),
        Job("r", tmp_path / "b"),
        *(Job("r", tmp_path / f"{i}", "e: r", False) for i in (0, 1)),
    ]
    assert describe_progress(jobs).startswith("1 of 4 trainings are done, 0 of 2 models are measured; about 5 min left")


def test_jobs_of_every_kind_have_their_folders(tmp_path):
    counts = {"var-guidance": (6, 2), "tokenizer": (6, 6), "mepa-cost": (2, 2)}
    for name, (jobs, trainings) in counts.items():
        experiment = load_experiment(name, "tiny", on_cpu=True)
        found = list_jobs(experiment, resolve_inputs(experiment, {}), tmp_path)
        assert (len(found), len({job.folder for job in found})) == (jobs, trainings), name
    experiment = load_experiment("var-guidance", "tiny", on_cpu=True)
    assert format_progress(experiment, resolve_inputs(experiment, {"model": "m"}), tmp_path) == ""
