"""Curves of several runs, from logs whose means, deviations and crossings are known."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

from nextscale.research.analysis.convergence import analyse_convergence
from tests.test_cli import fails


def write_log(folder: Path, losses: dict[int, float]) -> str:
    """A run's log, as training writes it; the two scales have 1 more and 1 less than the whole."""
    folder.mkdir()
    lines = [{"task": "tokenizer", "step": 5, "loss": 1.0}]
    for step, loss in losses.items():
        lines += [
            {"task": "transformer", "step": step, "loss": 9.0, "cross_entropy": loss + 0.5},
            {"task": "transformer", "step": step, "validation_loss": loss,
             "validation_loss_per_scale": [loss + 1, loss - 1]},
        ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"task": "tra')
    return str(folder)


def test_convergence_says_who_is_sooner_there(tmp_path):
    runs = [
        write_log(tmp_path / "plain-0", {10: 5.0, 20: 4.4, 30: 4.2}),
        write_log(tmp_path / "plain-1", {10: 5.2, 20: 4.6, 30: 4.4, 40: 3.0}),
        write_log(tmp_path / "guided", {10: 4.7, 20: 4.1, 30: 3.9}),
        write_log(tmp_path / "worse", {10: 6.0, 20: 5.0}),
        write_log(tmp_path / "at once", {10: 4.0}),
    ]
    report = analyse_convergence(runs, tmp_path / "out", ["plain", "plain", "guided", "worse", "at once"])
    assert report == json.loads((tmp_path / "out" / "convergence.json").read_text())
    assert Image.open(tmp_path / "out" / "convergence.png").width > 300
    plain, guided, worse, at_once = report["curves"]
    assert plain["steps"] == [10, 20, 30], "what all runs of the name have"
    assert plain["validation_loss"] == pytest.approx([5.1, 4.5, 4.3])
    assert plain["validation_loss_deviation"] == pytest.approx([statistics.stdev([5.0, 5.2])] * 3)
    assert plain["validation_loss_per_scale"][1] == pytest.approx([5.5, 3.5])
    assert plain["training_loss"] == pytest.approx([5.6, 5.0, 4.8])
    assert report["target"] == pytest.approx(4.3)
    assert [c["steps_to_target"] for c in (plain, worse, at_once)] == [30, None, 10]
    assert guided["steps_to_target"] == pytest.approx(10 + 10 * 0.4 / 0.6)
    assert [c["speedup"] for c in (plain, worse, at_once)] == [1, None, 3]
    assert report["scales"] == ["scale 1", "scale 2"]


def test_convergence_of_what_is_no_run(tiny_folder, tmp_path, capsys):
    command = ["analyse", "convergence", "--out", tmp_path / "out"]
    assert "model is not the folder of a run: it has no log.jsonl" in fails(capsys, *command, tiny_folder)
    (tmp_path / "log.jsonl").write_text("")
    assert "has no validated step of a generator's training" in fails(capsys, *command, tmp_path)
    runs = [write_log(tmp_path / "a", {10: 5.0}), write_log(tmp_path / "b", {20: 5.0})]
    said = fails(capsys, *command, *runs, "--names", "A", "A")
    assert "the 2 runs named A have no validated step in common" in said
    log = Path(runs[1]) / "log.jsonl"
    log.write_text(log.read_text().replace("[6.0, 4.0]", "[6.0]"))
    assert "the runs have different numbers of scales (1, 2)" in fails(capsys, *command, *runs)
    assert not (tmp_path / "out").exists()
