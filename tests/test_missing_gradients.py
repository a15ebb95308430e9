"""The note on parameters without gradient after the first step: with two processes, and in the tasks of sparsify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextscale.checkpoints import Checkpoint
from nextscale.common.distributed import init_distributed
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.pipeline import Pipeline
from nextscale.sparsify.convert import replace_gelu, split_ffns
from nextscale.sparsify.tasks import AdaptTask, RouterTask, TuneTask
from nextscale.training.engine.loop import train
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests import forked
from tests.conftest import randomised, tiny_config
from tests.test_settings import build_examples, build_generator

CASES = ("none", "dense"), ("full", "dense"), ("none", "stmoe"), ("full", "stmoe"), ("experts", "stmoe")
"""Ways to use two processes, and models."""


def build(model: str, unused: bool):
    """A transformer's task. `unused`: with a head of semantic guidance that no loss uses."""
    experts = {} if model == "dense" else {"experts": ExpertsConfig(router=model, count=4, active=2)}
    return build_generator(features=6 if unused else 0, **experts)


def run_cases(folder: Path) -> None:
    """All cases, in one of several processes."""
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        for sharding, model in CASES:
            for unused in (False, True):
                if world.main:
                    print(f"== {sharding} {model} {unused}", flush=True)
                config = TrainConfig(steps=1, batch_size=12, warmup_steps=0, sharding=sharding)
                train(build(model, unused), config, folder / f"{sharding}-{model}-{unused}", world=world)


def read_notes(text: str) -> dict[str, list[str]]:
    """The notes of each case."""
    notes: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("== "):
            notes.setdefault(line[3:], [])
        elif "no gradient" in line:
            list(notes.values())[-1].append(line)
    return notes


def test_two_processes_name_exactly_what_does_not_learn(tmp_path):
    ended = [process.end() for process in forked.start_all(2, run_cases, tmp_path, files=tmp_path / "said")]
    assert [status for status, _, _ in ended] == [0, 0], ended
    notes = read_notes(ended[0][1] + ended[1][1])
    for sharding, model in CASES:
        assert notes[f"{sharding} {model} False"] == []
        (line,) = notes[f"{sharding} {model} True"]
        assert line.endswith("do not learn: projector"), line


def build_sparse(task: str):
    dense = randomised(tiny_config())
    checkpoint = Checkpoint(dense.config, dense.tokenizer.state_dict(), dense.transformer.state_dict(), {})
    start = replace_gelu(checkpoint, 2, late_only=False)
    start = start if task == "tune" else split_ffns(start, 16, 2, 8)
    pipeline = Pipeline.from_checkpoint(start, backend="plain")
    arguments = pipeline.transformer, pipeline.tokenizer, build_examples(pipeline.transformer.pyramid), TrainConfig()
    if task == "tune":
        return TuneTask(*arguments, hoyer=0.1)
    scales = len(pipeline.transformer.pyramid)
    return RouterTask(*arguments) if task == "routers" else AdaptTask(*arguments, Thresholds((1.0,) * scales))


@pytest.mark.parametrize("name", ["tune", "routers", "adapt"])
def test_every_parameter_of_sparsify_learns(name, tmp_path, capsys):
    task, config = build_sparse(name), TrainConfig(steps=1, batch_size=12, warmup_steps=0)
    train(task, config, tmp_path / "whole")
    assert "no gradient" not in capsys.readouterr().out
    task = build_sparse(name)
    idle, parameter = [(n, p) for n, p in task.trained.named_parameters() if p.requires_grad][-1]
    parameter.register_hook(lambda gradient: gradient * 0)
    train(task, config, tmp_path / "part")
    out = capsys.readouterr().out
    assert f"1 of {sum(p.requires_grad for p in task.trained.parameters())} trained parameters" in out
    module = idle.rpartition(".")[0]  # stands for its parameters where it has no other
    assert out.splitlines()[-1].endswith((f"do not learn: {idle}", f"do not learn: {module}"))
