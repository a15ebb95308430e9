"""The trainer: exact resume with real processes and signals, and the guards that keep a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.errors import UserError
from nextscale.train.config import TrainConfig
from nextscale.train.log import read_log
from nextscale.train.loop import adamw, batch_indices, fit, set_learning_rate
from nextscale.train.tokenizer_task import TokenizerTask
from nextscale.train.transformer_task import TransformerTask
from tests.conftest import randomised, tiny_config

SETTINGS = TrainConfig(steps=8, batch_size=6, warmup_steps=2, log_every=1, save_every=3, drop_path=0.2)


def tasks(pipeline):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=rng, dtype=torch.uint8)
    tokens = torch.randint(0, 32, (20, 30), generator=rng)
    labels = torch.randint(0, 5, (20,), generator=rng)
    return (
        TokenizerTask(pipeline.tokenizer, images),
        TransformerTask(pipeline.transformer, pipeline.tokenizer, tokens, labels, SETTINGS),
    )


def weights(task):
    return {n: t.clone() for n, t in task.module.state_dict().items()}


@pytest.mark.parametrize("which", [0, 1])
def test_interrupted_and_resumed_equals_uninterrupted(which, tmp_path):
    """Bit for bit, in the middle of an epoch (20 examples, batches of 6), with a fresh process's modules."""
    whole = tasks(randomised(tiny_config()))[which]
    fit(whole, SETTINGS, tmp_path / "whole")

    class StopAfterFive(type(whole)):
        def loss(self, index_B, step, rng):
            if step == 5:
                raise KeyboardInterrupt
            return super().loss(index_B, step, rng)

    first = tasks(randomised(tiny_config()))[which]
    first.__class__ = StopAfterFive
    with pytest.raises(KeyboardInterrupt):
        fit(first, SETTINGS, tmp_path / "parts")
    second = tasks(randomised(tiny_config()))[which]
    for tensor in second.module.state_dict().values():
        tensor.fill_(9)  # all must come from the state
    fit(second, SETTINGS, tmp_path / "parts")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor), name
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "parts")]
    for record in logs[0] + logs[1]:
        assert record.pop("images_per_s") > 0
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[1]] == list(range(1, 9))


RUN = """
import sys, torch
from pathlib import Path
from nextscale.train.loop import fit, Interrupted
from tests.test_train import tasks, SETTINGS
from tests.conftest import randomised, tiny_config
from dataclasses import replace
torch.set_num_threads(1)
task = tasks(randomised(tiny_config()))[0]
try:
    fit(task, replace(SETTINGS, steps=int(sys.argv[2]), save_every=1), Path(sys.argv[1]))
except Interrupted as stop:
    print("stopped", stop.step)
    sys.exit(5)
torch.save(task.module.state_dict(), sys.argv[1] + "/final.pt")
"""


def start(folder: Path, steps: int) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(steps)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_in_a_real_process(number, tmp_path):
    """Interrupted, terminated or killed while training, a run goes on and ends with the same weights."""
    steps = 60
    process = start(tmp_path / "cut", steps)
    state = tmp_path / "cut" / "training" / "tokenizer.pt"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 5, err
        assert "stopped" in out
    assert not (tmp_path / "cut" / "final.pt").exists()
    for folder in ("cut", "whole"):
        assert start(tmp_path / folder, steps).wait(timeout=120) == 0
    cut, whole = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("cut", "whole"))
    assert all(torch.equal(cut[n], t) for n, t in whole.items())


def test_changed_settings_are_named_and_refused(tmp_path):
    task = tasks(randomised(tiny_config()))[0]
    fit(task, SETTINGS, tmp_path)
    with pytest.raises(UserError, match="learning_rate was 0.001, now 0.5"):
        fit(task, TrainConfig(**{**SETTINGS.__dict__, "learning_rate": 0.5}), tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    task = tasks(randomised(tiny_config()))[0]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "tokenizer.pt").write_bytes(b"PK junk")
    with pytest.raises(UserError, match=r"training state .*tokenizer\.pt cannot be used .* delete it to train anew"):
        fit(task, SETTINGS, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path):
    task = tasks(randomised(tiny_config()))[0]
    fit(task, TrainConfig(**{**SETTINGS.__dict__}), tmp_path)
    before = (tmp_path / "training" / "tokenizer.pt").read_bytes()
    longer = tasks(randomised(tiny_config()))[0]
    with torch.no_grad():
        longer.tokenizer.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="step 0 are not both finite"):
        fit(longer, SETTINGS, tmp_path / "other")
    assert (tmp_path / "training" / "tokenizer.pt").read_bytes() == before


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 9))
def test_every_epoch_shows_every_example_once(examples, batch):
    config = TrainConfig(batch_size=batch)
    steps = -(-3 * examples // batch)
    seen = torch.cat([batch_indices(examples, config, "t", s) for s in range(steps)])[: 3 * examples]
    for epoch in seen.split(examples):
        assert sorted(epoch.tolist()) == list(range(examples))


def test_learning_rate_warms_up_and_falls_to_its_end():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0)
    rates = []
    for step in range(101):
        set_learning_rate(optimizer, config, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("shared", [False, True])
def test_weight_decay_groups_are_var_s(shared):
    model = randomised(tiny_config(shared_adaln=shared)).transformer
    decayed = {id(p) for p in adamw(model, SETTINGS).param_groups[0]["params"]}
    spared = {n for n, p in model.named_parameters() if id(p) not in decayed}
    expected = {"pos_start", "pos_embed", "level_embed.weight"}
    expected |= {n for n, p in model.named_parameters() if p.ndim < 2}
    expected |= {f"blocks.{i}.mixers.0.log_scale" for i in range(2)}
    expected |= {f"blocks.{i}.adaln.offset" for i in range(2)} if shared else set()
    assert spared == expected
    assert id(model.condition.embedding.weight) in decayed


def test_log_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"task": "t", "step": 1}) + '\n{"task": "t", "st')
    assert read_log(path) == [{"task": "t", "step": 1}]


def test_training_learns(tmp_path):
    """On labels that decide the tokens the loss falls far below that of guessing."""
    pipeline = randomised(tiny_config("1,2"))
    tokens = torch.arange(5)[:, None].expand(5, 5).contiguous()
    config = TrainConfig(steps=60, batch_size=10, learning_rate=1e-2, label_drop=0.0, warmup_steps=5)
    fit(TransformerTask(pipeline.transformer, pipeline.tokenizer, tokens, torch.arange(5), config), config, tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["loss"] < 0.2
