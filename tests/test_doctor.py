"""`nextscale doctor`: what it says of a machine on which things are missing or broken, and its checks of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextscale.doctor.agreement import check_logits
from nextscale.doctor.environment import check_folders, check_hub
from nextscale.doctor.models import FAMILIES, create_model, predict_logits
from nextscale.doctor.result import Result, count_status, run_check

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DOCTOR = """
from nextscale.cli.parser import main
from nextscale.doctor import speed
speed._ROUNDS, speed._BATCH = 1, 2  # how fast types are is not looked at: a third of the processor time
raise SystemExit(main(["doctor", "--json"]))
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The results on a machine with AVX2, a compiler that fails, a cache that is no folder and without matplotlib."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "cache").write_text("no folder")
    (folder / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    changes = {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CC": "/bin/false", "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    }  # fmt: skip
    command = [sys.executable, "-c", DOCTOR]
    done = subprocess.run(command, cwd=folder, env=os.environ | changes, capture_output=True, text=True, timeout=300)
    results = {result["name"]: Result(**result) for result in json.loads(done.stdout)}
    return results, done


def test_what_is_broken_has_its_line_and_results_are_right_without_it(broken):
    results, done = broken
    assert results["matplotlib"].status == "skip"
    assert "nextscale[quickstart]" in results["matplotlib"].advice
    assert results["cache folder"].status == "slow"
    assert "XDG_CACHE_HOME" in results["cache folder"].advice
    assert results["kernels, experts"].status == "slow"
    assert results["hub"].status == "skip"
    assert "AVX2" in results["torch"].found
    for name in (*FAMILIES, *(f"batch, {name}" for name in FAMILIES), "capture", "processes"):
        assert results[name].status == "pass", results[name]
    assert done.returncode == (1 if any(result.status == "fail" for result in results.values()) else 0), done.stderr


def test_folders_that_cannot_be_written_or_are_nearly_full_fail(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    results = {result.name: result for result in check_folders(tmp_path)}
    assert (results["current folder"].status, results["cache folder"].status) == ("pass", "slow")
    results = {result.name: result for result in check_folders(Path("/proc"))}
    assert results["current folder"].status == "fail"


def test_a_hub_that_does_not_answer_fails_unless_offline_is_set(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (result,) = check_hub()
    assert result.status == "fail"
    assert "HF_HUB_OFFLINE=1" in result.advice


def test_wrong_results_fail():
    """A model with one weight changed differs from the reference."""
    config = FAMILIES["dense"]
    plain = create_model(config, "plain", CPU, torch.float32)
    tokens_BL = plain.sample([1, 4, 7, 2], cfg=1.5).tokens
    reference = predict_logits(plain, [1, 4, 7, 2], tokens_BL)
    model = create_model(config, "auto", CPU, torch.float32)
    assert check_logits("dense", model, reference, tokens_BL).status == "pass"
    with torch.no_grad():
        model.transformer.head.bias[0] += 0.1
    assert check_logits("dense", model, reference, tokens_BL).status == "fail"


def test_a_check_that_raises_fails_and_the_others_run():
    def check():
        yield Result("first", "pass", "")
        raise RuntimeError("no such\ndevice")

    results = list(run_check("device", check))
    assert [r.status for r in results] == ["pass", "fail"]
    assert results[1].found == "RuntimeError: no such device"
    assert count_status(results) == {"pass": 1, "slow": 0, "fail": 1, "skip": 0}
