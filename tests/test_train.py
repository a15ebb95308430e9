"""The trainer: exact resume with real processes and signals, and the guards that keep a run."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.encoder import EncoderConfig, MocoConfig, ViewConfig
from nextscale.config.log import read_log
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig, PositionConfig
from nextscale.config.transformer_training import LossConfig, SizesConfig
from nextscale.data.examples import BatchDataset, MemoryExamples
from nextscale.data.sizes import join_sizes
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.training.encoder import EncoderTask
from nextscale.training.engine.checks import Interrupted
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.engine.optimizer import build_optimizer, compute_learning_rate, compute_weight_decay
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.transformer import TransformerTask
from tests import forked
from tests.conftest import losses_by_precision, randomised, threads, tiny_config

SETTINGS = TrainConfig(steps=8, batch_size=6, warmup_steps=2, log_every=1, save_every=3, drop_path=0.2)


def tasks(pipeline):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=rng, dtype=torch.uint8)
    tokens = torch.randint(0, 32, (20, 30), generator=rng)
    labels = torch.randint(0, 5, (20,), generator=rng)
    return (
        TokenizerTask(pipeline.tokenizer, MemoryExamples(image=images)),
        TransformerTask(
            pipeline.transformer, pipeline.tokenizer, MemoryExamples(tokens=tokens, label=labels), SETTINGS
        ),
        encoder_task(images),
    )


def mixture_task(router, loss=None, **experts):
    """Experts by this router, guided by random features."""
    experts = ExpertsConfig(router=router, count=4, active=2, **experts)
    pipeline = randomised(tiny_config(experts=experts, alignment=AlignmentConfig(width=6, hidden=16)))
    rng = torch.Generator().manual_seed(0)
    examples = MemoryExamples(
        tokens=torch.randint(0, 32, (20, 30), generator=rng),
        label=torch.randint(0, 5, (20,), generator=rng),
        features=torch.randn(20, 4, 4, 6, generator=rng),
    )
    return TransformerTask(
        pipeline.transformer, pipeline.tokenizer, examples, SETTINGS, loss or LossConfig(encoder="cache", group="1,3")
    )


def combined_task():
    """Captions and control pictures of the data, read by cross-attention."""
    parts = {"caption": ConditionConfig("text", max_tokens=6, layers=1)}
    parts["mask"] = ConditionConfig("picture", picture_size=(8, 8), layers=1)
    condition = ConditionConfig("combined", parts=parts)
    pipeline = randomised(tiny_config(condition=condition, mixers=("attention", "cross-attention")))
    rng = torch.Generator().manual_seed(0)
    examples = MemoryExamples(
        tokens=torch.randint(0, 32, (20, 30), generator=rng),
        text=torch.randint(0, 256, (20, 5), generator=rng, dtype=torch.uint8),
        text_length=torch.randint(0, 6, (20,), generator=rng),
        control=torch.randint(0, 256, (20, 1, 8, 8), generator=rng, dtype=torch.uint8),
    )
    return TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, SETTINGS)


def sized_task():
    """Tokens at two sizes, by tables of positions that are resampled, in some steps of the first scales alone."""
    pipeline = randomised(tiny_config(positions=PositionConfig(size_embedding=True)))
    rng, sizes = torch.Generator().manual_seed(0), SizesConfig(("1,2x3,3x4",), drop=0.4)
    pyramids = sizes.list_pyramids(pipeline.config.pyramid)
    parts = [
        MemoryExamples(
            tokens=torch.randint(0, 32, (10 + i, pyramid.length), generator=rng),
            label=torch.randint(0, 5, (10 + i,), generator=rng),
        )
        for i, pyramid in enumerate(pyramids)
    ]
    examples, _ = join_sizes(parts, parts, pyramids, pipeline.config.pyramid, SETTINGS.batch_size)
    return TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, SETTINGS, sizes=sizes)


def encoder_task(images):
    """Of a tiny encoder, from fixed weights; its queue of 16 keys is no multiple of the batch of 6."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SmallEncoder(EncoderConfig(images.shape[-1], (8, 16), (1, 1), 4))
        return EncoderTask(encoder, MemoryExamples(image=images), MocoConfig(16, 0.9, 0.2, 16, 8), ViewConfig())


def weights(task):
    return {n: t.clone() for n, t in task.trained.state_dict().items()}


@pytest.mark.parametrize("which", [0, 1, 2])
def test_interrupted_and_resumed_equals_uninterrupted(which, tmp_path):
    """Bit for bit, in the middle of an epoch (20 examples, batches of 6), with a fresh process's modules."""
    whole = tasks(randomised(tiny_config()))[which]
    train(whole, SETTINGS, tmp_path / "whole")

    class StopAfterFive(type(whole)):
        def forward(self, batch, noise, step):
            if step == 5:
                raise KeyboardInterrupt
            return super().forward(batch, noise, step)

    first = tasks(randomised(tiny_config()))[which]
    first.__class__ = StopAfterFive
    with pytest.raises(KeyboardInterrupt):
        train(first, SETTINGS, tmp_path / "parts")
    second = tasks(randomised(tiny_config()))[which]
    for tensor in second.trained.state_dict().values():
        tensor.fill_(9)  # all must come from the state
    train(second, SETTINGS, tmp_path / "parts")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor), name
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "parts")]
    for record in logs[0] + logs[1]:
        assert record.pop("images_per_s") > 0
        record.pop("tokens_per_s")
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[1]] == list(range(1, 9))


LONG = replace(SETTINGS, steps=40, save_every=1)  # a save takes several times as long as a step
SELDOM = replace(LONG, save_every=LONG.steps)


def run_long(folder: Path) -> int:
    """The long run, in a process of its own."""
    torch.set_num_threads(1)
    try:
        train(tasks(randomised(tiny_config()))[0], replace(LONG, workers=1), folder)
    except Interrupted as stop:
        print("stopped", stop.step)
        return 5
    return 0


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """Weights of the long run without a signal."""
    task = tasks(randomised(tiny_config()))[0]
    with threads(1):  # as the processes that are interrupted
        train(task, SELDOM, tmp_path_factory.mktemp("whole"))
    return weights(task)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_in_a_real_process(number, left_alone, threads_set, tmp_path):
    """Interrupted, terminated or killed while training, a run goes on, by another process, to the same weights."""
    threads_set(1)
    process = forked.start(run_long, tmp_path / "cut", files=tmp_path / "said")
    states = tmp_path / "cut" / "training"
    deadline = time.monotonic() + 240
    while not list(states.glob("tokenizer-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill(number)
    status, out, err = process.end()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 5, err
        assert "stopped" in out
    assert not (states / f"tokenizer-{LONG.steps:08d}.pt").exists(), "cut short"
    task = tasks(randomised(tiny_config()))[0]
    train(task, SELDOM, tmp_path / "cut")
    assert all(torch.equal(weights(task)[n], t) for n, t in left_alone.items())


def test_changed_settings_are_named_and_refused(tmp_path):
    task = tasks(randomised(tiny_config()))[0]
    train(task, SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"other settings: learning_rate was 0\.001, now 0\.5$"):
        train(task, replace(SETTINGS, learning_rate=0.5), tmp_path)


def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path):
    """The state before it is used, and the run ends with the same weights; with none left the run is refused."""
    whole = tasks(randomised(tiny_config()))[0]
    train(whole, SETTINGS, tmp_path / "whole")
    train(tasks(randomised(tiny_config()))[0], replace(SETTINGS, save_every=1), tmp_path / "hurt")
    states = sorted((tmp_path / "hurt" / "training").glob("*.pt"))
    assert [p.name for p in states] == ["tokenizer-00000007.pt", "tokenizer-00000008.pt"]
    content = bytearray(states[1].read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    states[1].write_bytes(content)
    again = tasks(randomised(tiny_config()))[0]
    with pytest.warns(UserWarning, match=r"tokenizer-00000008\.pt cannot be used .*checksum.*trying the state before"):
        train(again, SETTINGS, tmp_path / "hurt")
    assert all(torch.equal(t, weights(again)[n]) for n, t in weights(whole).items())
    for path in (tmp_path / "hurt" / "training").glob("*.pt"):
        path.write_bytes(b"PK junk")
    with (
        pytest.raises(UserError, match=r"no sound training state is left: delete .*training to train anew"),
        pytest.warns(UserWarning, match="cannot be used"),
    ):
        train(again, SETTINGS, tmp_path / "hurt")


def test_a_loss_that_is_not_finite_stops_the_run_names_the_place_and_keeps_the_last_state(tmp_path):
    for which, damage, words in (
        (
            0,
            lambda t: t.tokenizer.decoder.middle[0].conv2.bias,
            "the first layer at fault is tokenizer.decoder.middle.0.conv2",
        ),
        (
            1,
            lambda t: t.model.blocks[1].ffn.fc2.bias,
            "at all scales; the first layer at fault is blocks.1",
        ),
    ):
        folder = tmp_path / f"{which}{words[:20]}"
        train(tasks(randomised(tiny_config()))[which], replace(SETTINGS, steps=3), folder)
        (state,) = (folder / "training").glob("*3.pt")
        before = state.read_bytes()

        class Broken(type(tasks(randomised(tiny_config()))[which])):
            def forward(self, batch, noise, step, damage=damage):
                with torch.no_grad():
                    damage(self).fill_(float("nan"))
                return super().forward(batch, noise, step)

        longer = tasks(randomised(tiny_config()))[which]
        longer.__class__ = Broken
        with pytest.raises(UserError, match=f"at step 3 are not both finite; {words}.*checkpoint of step 3 is kept"):
            train(longer, SETTINGS, folder, accept_changes=True)
        assert state.read_bytes() == before


def test_the_scale_at_fault_is_named():
    task = tasks(randomised(tiny_config()))[1]
    nan = float("nan")
    for values, words in (([1.0, nan, 2.0, nan], "scale 2x2, 4x4"), ([nan] * 4, "all scales"), ([1.0] * 4, "")):
        assert task.describe_faulty_scales({"loss_per_scale": torch.tensor(values)}) == words


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    class Root(type(tasks(randomised(tiny_config()))[1])):
        def forward(self, batch, noise, step):
            loss, scalars = super().forward(batch, noise, step)
            return loss + (self.model.head.bias[0] * 0).abs().sqrt(), scalars  # the slope of a root at 0 is infinite

    task = tasks(randomised(tiny_config()))[1]
    task.__class__ = Root
    with pytest.raises(UserError, match=r"the gradient of head\.bias and 0 more parameters is not; no checkpoint"):
        train(task, replace(SETTINGS, clip=0.0), tmp_path)


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3))
def test_every_epoch_shows_every_example_once_over_all_processes(examples, own, processes):
    config = TrainConfig(batch_size=own * processes, micro_batch=2)
    places = BatchDataset(MemoryExamples(x=torch.zeros(examples)), 0, "t")
    seen = []
    for step in range(-(-3 * examples // config.batch_size)):
        batch = sorted((p.start, p.stop) for rank in config.split_batch(processes) for p in rank)
        for start, stop in batch:
            seen += places.select_indices(step * config.batch_size + start, step * config.batch_size + stop)
    for epoch in range(3):
        assert sorted(seen[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="batch_size 10 cannot be divided among 4 processes"):
        TrainConfig(batch_size=10).split_batch(4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_are_var_s(schedule):
    """Against the official formulas, written out: warm-up from 0.5 %, then down to the final share at the last step."""
    config = TrainConfig(
        learning_rate=2.0, final_learning_rate=0.2, schedule=schedule, warmup_start=0.005, flat=0.05,
        weight_decay=0.05, final_weight_decay=0.08,
    )  # fmt: skip
    steps, warmup = 100, 10
    for step in range(steps):
        if step < warmup:
            expected = 0.005 + 0.995 * step / warmup
        else:
            passed = (step - warmup) / (steps - 1 - warmup)
            if schedule == "cosine":
                expected = 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * passed))
            else:
                expected = 1 if passed < 0.05 else 0.1 + 0.9 * (1 - passed) / 0.95
        assert compute_learning_rate(config, step, steps, warmup) == pytest.approx(2 * expected)
        decay = 0.08 + (0.05 - 0.08) * (0.5 + 0.5 * math.cos(math.pi * step / (steps - 1)))
        assert compute_weight_decay(config, step, steps) == pytest.approx(decay)
    assert compute_learning_rate(config, steps - 1, steps, warmup) == pytest.approx(0.2)


def test_epochs_in_place_of_steps():
    config = TrainConfig(epochs=3, warmup_epochs=0.5, batch_size=10)
    assert config.schedule_steps(100) == (30, 5)
    assert TrainConfig(steps=7, warmup_steps=50).schedule_steps(100) == (7, 7)


@pytest.mark.parametrize("shared", [False, True])
def test_weight_decay_groups_are_var_s(shared):
    model = randomised(tiny_config(shared_adaln=shared)).transformer
    decayed = {id(p) for p in build_optimizer(model, SETTINGS).param_groups[0]["params"]}
    spared = {n for n, p in model.named_parameters() if id(p) not in decayed}
    expected = {"pos_start", "pos_embed", "level_embed.weight"}
    expected |= {n for n, p in model.named_parameters() if p.ndim < 2}
    expected |= {f"blocks.{i}.mixers.0.log_scale" for i in range(2)}
    expected |= {f"blocks.{i}.adaln.offset" for i in range(2)} if shared else set()
    assert spared == expected
    assert id(model.condition.embedding.weight) in decayed


@pytest.mark.parametrize("which", [0, 1])
def test_lower_precision_stays_near(which, tmp_path):
    """bfloat16 and float16 (scaled) lose what float32 loses, but for rounding; recomputation changes nothing."""
    losses = losses_by_precision(lambda config: tasks(randomised(tiny_config()))[which], SETTINGS, tmp_path)
    for name in ("bfloat16", "float16"):
        assert losses[name] == pytest.approx(losses["float32"], rel=0.03)


def test_averaged_weights_are_the_moving_average(tmp_path):
    """What is validated and saved is the average of the weights after each step, written out."""
    config, seen, kept = replace(SETTINGS, ema=0.8, save_every=1), [], []

    class Watch(Callbacks):
        def validate(self, step):
            return {}

        def save_model(self, step, best):
            kept.append({n: p.detach().clone() for n, p in task.trained.named_parameters()})

    class Seeing(TransformerTask):
        def after_step(self, step, rng, world):
            seen.append({n: p.detach().double() for n, p in self.trained.named_parameters()})

    task = tasks(randomised(tiny_config()))[1]
    average = {n: p.detach().double() for n, p in task.trained.named_parameters()}
    task.__class__ = Seeing
    train(task, config, tmp_path, Watch())
    for now, held in zip(seen, kept, strict=True):
        average = {n: 0.8 * average[n] + 0.2 * now[n] for n in average}
        assert all(torch.allclose(held[n].double(), average[n], atol=1e-6) for n in average)
    assert all(torch.equal(p, kept[-1][n]) for n, p in task.trained.named_parameters()), "and what the task ends with"


def test_the_best_state_is_kept(tmp_path):
    """Of ten saves two stay, and the one with the lowest validation loss."""
    losses, bests = [5, 4, 1, 3, 2, 6, 7, 8], []

    class Watch(Callbacks):
        def validate(self, step):
            return {"validation_loss": float(losses[step - 1])}

        def save_model(self, step, best):
            bests.append(best)

    train(tasks(randomised(tiny_config()))[1], replace(SETTINGS, save_every=1), tmp_path, Watch())
    assert bests == [True, True, True] + [False] * 5
    training = tmp_path / "training"
    assert sorted(int(p.stem[-3:]) for p in training.glob("*.pt")) == [3, 7, 8]
    losses += [4, 0.5]
    record = training / "transformer-best.json"
    record.unlink()
    with pytest.warns(UserWarning, match="transformer-best.json was missing; log.jsonl says that step 3 is the best"):
        train(tasks(randomised(tiny_config()))[1], replace(SETTINGS, save_every=1, steps=10), tmp_path, Watch(),
              accept_changes=True)  # fmt: skip
    assert bests[8:] == [False, True], "step 9 is worse than step 3, whose record was lost"
    record.unlink()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="transformer-best.json and the log are missing"):
        train(tasks(randomised(tiny_config()))[1], replace(SETTINGS, save_every=1, steps=11), tmp_path, Watch(),
              accept_changes=True)  # fmt: skip


def test_log_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"task": "t", "step": 1}) + '\n{"task": "t", "st')
    assert read_log(path) == [{"task": "t", "step": 1}]


def test_training_learns(tmp_path):
    """On labels that decide the tokens the loss falls far below that of guessing."""
    pipeline = randomised(tiny_config("1,2"))
    tokens = torch.arange(5)[:, None].expand(5, 5).contiguous()
    config = TrainConfig(steps=60, batch_size=10, learning_rate=1e-2, label_drop=0.0, warmup_steps=5)
    examples = MemoryExamples(tokens=tokens, label=torch.arange(5))
    train(TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, config), config, tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["loss"] < 0.2


def test_a_reader_that_dies_is_told_from_other_failures():
    from nextscale.training.engine.checks import describe_worker_death

    assert "handed over" in describe_worker_death(ConnectionResetError(104, "reset by peer"), 2)
    assert "handed over" in describe_worker_death(EOFError(), 1)
    assert describe_worker_death(RuntimeError("DataLoader worker (pid 7) is killed\nmore"), 1).endswith("is killed")
    assert describe_worker_death(RuntimeError("shapes differ"), 1) == ""
    assert describe_worker_death(EOFError(), 0) == ""
