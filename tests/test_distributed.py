"""Several processes, real ones over gloo: they compute what one does, and their states are interchangeable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def train(folder: Path, which: int, *changes: str, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.train_worker", str(folder), str(which), *changes]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "final.pt", weights_only=True)


def difference(a: dict, b: dict) -> float:
    """Largest difference of the weights, relative to the largest weight of a tensor.

    Without the biases of the tokenizer's keys: they shift all scores of a query alike, so they change nothing, and
    their gradient is rounding error, which Adam makes a whole step of.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for name in a:
        x, y = a[name].double(), b[name].double()
        if name.endswith("qkv.bias"):
            x, y = (torch.cat(t.chunk(3)[::2]) for t in (x, y))
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-3)))
    return worst


@pytest.mark.parametrize(
    ("which", "changes", "rounding"),
    [
        (1, [], 1e-6),
        (1, ["sharding=full", "ema=0.9", "activation_checkpointing=1"], 1e-6),
        (0, ["codebook=ema"], 1e-6),
        (2, [], 1e-5),
        (1, ["router=stmoe", "sharding=full"], 1e-6),
        (1, ["router=stmoe", "sharding=experts", "ema=0.9", "activation_checkpointing=1"], 1e-6),
        (1, ["router=moe++", "sharding=experts"], 1e-6),
    ],
)
def test_two_processes_equal_one_that_accumulates(which, changes, rounding, tmp_path):
    """Ten steps of six examples in portions of two, by one process and by two: label drop, stochastic depth, and the
    codebook's moving averages and revival, and an encoder's queue of keys included."""
    changes = [*changes, "steps=10", "micro_batch=2"]
    train(tmp_path / "one", which, *changes)
    train(tmp_path / "two", which, *changes, processes=2)
    assert difference(final(tmp_path / "one"), final(tmp_path / "two")) < rounding


@pytest.mark.parametrize("changes", [["sharding=none"], ["sharding=full"], ["sharding=experts", "router=smoe"]])
def test_a_state_of_two_processes_goes_on_with_one_and_back(changes, tmp_path):
    changes = [*changes, "ema=0.9", "save_every=1"]
    changes += ["accept=1", "final_learning_rate=1e-3"]  # the same rate throughout, however many steps there are
    for steps, processes in ((3, 2), (6, 1), (9, 2)):
        train(tmp_path / "run", 1, *changes, f"steps={steps}", processes=processes)
    train(tmp_path / "alone", 1, *changes, "steps=9")
    assert difference(final(tmp_path / "run"), final(tmp_path / "alone")) < 1e-6


def test_what_cannot_be_divided_is_refused(tmp_path):
    """Three experts' worth of processes for four experts; and a dense model, which has none."""
    for changes, processes, message in (
        (["router=stmoe"], 3, "4 experts cannot be divided evenly among 3 processes"),
        ([], 2, "sharding: experts needs a mixture of experts"),
    ):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "tests.train_worker",
            str(tmp_path),
            "1",
            "sharding=experts",
            *changes,
        ]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0
        assert message in done.stderr
