"""A training step of every task on a GPU beside the CPU; resuming; several processes; the micro-batch."""

from dataclasses import replace

import pytest
import torch

from nextscale.common.distributed import World
from nextscale.config.log import read_log
from nextscale.config.training import TrainConfig
from nextscale.doctor.processes import check_processes
from nextscale.pipeline import Pipeline
from nextscale.quickstart.run import run_quickstart
from nextscale.training.engine.loop import train
from tests.rehearsal.cases import TASKS
from tests.test_quickstart import tiny_settings
from tests.train_worker import break_off

CONFIG = TrainConfig(steps=1, batch_size=6, micro_batch=3, workers=0, log_every=1, warmup_steps=0, drop_path=0.1)
LOSS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Relative error of the loss that rounding explains."""
NORM = {"float32": 0.02, "bfloat16": 0.3, "float16": 0.2}
"""Of the gradient's norm, which is sensitive to which codes and experts are chosen."""


def create(name):
    """The task of the rehearsal, with weights and examples drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = TASKS[name](CONFIG)
        for parameter in task.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for column, tensor in task.examples.tensors.items():
            if tensor.is_floating_point():
                tensor.normal_()
            elif column in ("image", "tokens"):
                tensor.random_(0, 256 if column == "image" else 32)
            else:
                tensor.random_(0, 2)
    return task


def train_on(device, name, folder, **changes):
    task = create(name)
    train(task, replace(CONFIG, **changes), folder, world=World(device=device))
    (record,) = [r for r in read_log(folder / "log.jsonl") if r["step"] == 1]
    return task, record


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_every_task_is_that_of_the_cpu(name, device, tmp_path):
    _, expected = train_on(torch.device("cpu"), name, tmp_path / "cpu")
    for precision in ("float32",) if device.type == "mps" else LOSS:
        _, found = train_on(device, name, tmp_path / precision, precision=precision)
        assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS[precision], abs=LOSS[precision])
        assert found["gradient_norm"] == pytest.approx(
            expected["gradient_norm"], rel=NORM[precision], abs=NORM[precision]
        )


@pytest.mark.parametrize("name", ["transformer stmoe", "tokenizer", "encoder"])
def test_a_resumed_run_is_the_uninterrupted_one(name, device, tmp_path):
    settings = {"steps": 4, "save_every": 2}
    whole, _ = train_on(device, name, tmp_path / "whole", **settings)
    first = create(name)
    break_off(first, 3)
    with pytest.raises(KeyboardInterrupt):
        train(first, replace(CONFIG, **settings), tmp_path / "parts", world=World(device=device))
    parts, _ = train_on(device, name, tmp_path / "parts", **settings)
    last = [read_log(tmp_path / run / "log.jsonl")[-1] for run in ("whole", "parts")]
    assert [record["step"] for record in last] == [4, 4]
    assert last[1]["loss"] == pytest.approx(last[0]["loss"], rel=1e-3)
    state = whole.trained.state_dict()
    for key, tensor in parts.trained.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-2, atol=1e-3, msg=key)


def test_a_micro_batch_is_found_on_the_device(device, tmp_path, capsys):
    """micro_batch auto: counted and, on a GPU, tried."""
    _, record = train_on(device, "transformer dense", tmp_path / "auto", micro_batch="auto")
    assert "6 of 6 images at once (micro_batch auto: about 0.00 GiB" in capsys.readouterr().out
    _, given = train_on(device, "transformer dense", tmp_path / "given", micro_batch=6)
    assert record["loss"] == pytest.approx(given["loss"], rel=1e-4)


def test_as_many_processes_as_gpus_train_as_one(device):
    if device.type == "mps":
        pytest.skip("processes cannot share this device")
    results = list(check_processes(device))
    assert results
    assert not [result.format() for result in results if result.status == "fail"]


def test_the_quickstart_runs_on_the_device(device, tmp_path):
    """All its stages: tokenizer, encoder, transformer, samples, pictures and figures."""
    metrics = run_quickstart(tiny_settings(), tmp_path / "run", device=str(device))
    assert metrics["reconstruction_psnr_db"] > 0
    assert metrics["cross_entropy_nats_per_token"]["held_out"] > 0
    assert Pipeline.from_pretrained(tmp_path / "run", device="cpu").sample([1]).tensor.isfinite().all()
