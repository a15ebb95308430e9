"""`nextscale bench`: the table, the JSON line, and figures that belong together."""

from __future__ import annotations

import json
import subprocess

import pytest

from nextscale.cli.parser import main
from tests.conftest import randomised, tiny_config


def test_bench_of_two_models_prints_a_table_and_json(tmp_path, capsys, monkeypatch):
    """The peak memory of two of the eight cases is measured by processes of their own, as all are without this test."""
    real, measured = subprocess.run, []

    def run(command, **more):
        if "nextscale.evaluation.peak_memory" not in command:
            return real(command, **more)
        if len(measured) < 2:
            measured.append(real(command, **more))
        return measured[-1]

    monkeypatch.setattr(subprocess, "run", run)
    for name, depth in (("a", 1), ("b", 2)):
        randomised(tiny_config("1,2,4", depth=depth)).save_pretrained(tmp_path / name)
    command = ["bench", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--batch-sizes", "1", "3"]
    assert main([*command, "--dtypes", "float32", "bfloat16", "--rounds", "2", "--cfg", "1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert lines[0].endswith("2 rounds")
    assert any("times as fast as the other" in line for line in lines)
    cases = report["cases"]
    assert [(c["model"][-1], c["dtype"], c["batch"]) for c in cases] == [
        (m, d, b) for d in ("float32", "bfloat16") for b in (1, 3) for m in "ab"
    ]
    for case in cases:
        seconds = case["seconds"]
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        assert len(case["seconds_per_scale"]) == 3
        assert case["images_per_s"] == pytest.approx(case["batch"] / seconds["median"])
        assert case["gflop_per_s"] == pytest.approx(case["gflop_per_image"] * case["images_per_s"])
        assert case["peak_memory_bytes"] > 50 * 2**20, "a process with torch in it"
        assert ("times_as_fast" in case) == (case["model"][-1] == "a")
    assert cases[1]["gflop_per_image"] > cases[0]["gflop_per_image"], "b is deeper"
    assert report["sampling"]["cfg"] == 1.5
    assert report["machine"]["threads"] >= 1
    assert [done.returncode for done in measured] == [0, 0]


def test_bench_refuses_nonsense(tmp_path, capsys):
    randomised(tiny_config()).save_pretrained(tmp_path / "a")
    assert main(["bench", str(tmp_path / "a"), "--rounds", "0"]) == 2
    assert "--rounds must be 1 or more; got 0" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "nowhere")]) == 2
