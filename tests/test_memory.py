"""`micro_batch` and `workers` auto: what fits is counted, chosen once, tried where memory can run out, and kept."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nextscale.checkpoints import build_modules, build_on_meta
from nextscale.checkpoints.native import read_config
from nextscale.cli.parser import main
from nextscale.common.distributed import init_distributed
from nextscale.common.errors import UserError
from nextscale.common.machine import count_cores, measure_memory
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.data import DataConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.files import read_settings
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict
from nextscale.config.tokenizer_training import CodebookConfig, TokenizerLossConfig, TokenizerRunConfig, derive_pyramid
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import MVAR_MIXERS, AlignmentConfig, ExpertsConfig, MambaConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.datasets import open_dataset
from nextscale.data.examples import MemoryExamples
from nextscale.encoders.classifier import Classifier
from nextscale.training import activations
from nextscale.training.activations import count_activations
from nextscale.training.classifier import ClassifierTask
from nextscale.training.encoder import create_encoder_task
from nextscale.training.engine import loop, memory
from nextscale.training.engine.loop import train
from nextscale.training.engine.memory import (
    Activations,
    choose_micro_batch,
    choose_workers,
    count_state_bytes,
    measure_activations,
)
from nextscale.training.estimate import describe_gpus
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.transformer import TransformerTask
from nextscale.transformer.lora import add_adapters
from tests import forked
from tests.conftest import randomised, tiny_config
from tests.test_settings import KINDS, RECIPES
from tests.test_train import SETTINGS, mixture_task, tasks, weights
from tests.train_worker import break_off

ROOT = Path(__file__).parents[1]
RECIPE_FOLDER = ROOT / "nextscale" / "config" / "recipes"
CPU = torch.device("cpu")
GIB = 2**30


def adversarial_task():
    pipeline = randomised(tiny_config())
    losses = TokenizerLossConfig(adversarial=0.5, adversarial_start=0, discriminator_channels=4, discriminator_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TokenizerTask(
            pipeline.tokenizer, tasks(pipeline)[0].examples, losses, CodebookConfig(update="ema", revive_every=2)
        )


MAKERS = {
    "tokenizer": lambda: tasks(randomised(tiny_config()))[0],
    "adversarial": adversarial_task,
    "transformer": lambda: tasks(randomised(tiny_config()))[1],
    "mixture": lambda: mixture_task("stmoe"),
    "encoder": lambda: tasks(randomised(tiny_config()))[2],
}


def give_memory(monkeypatch, free, total=100 * GIB):
    """Let the trainer find so many free bytes besides the share that it leaves."""
    monkeypatch.setattr(memory, "measure_memory", lambda device: (int(free + memory.RESERVE * total), total))


def count_kept(task, config, count):
    """The bytes that autograd keeps of one pass, counted in another way: distinct addresses, without parameters."""
    own = {p.data_ptr() for p in task.parameters()}
    sizes, alive = {}, []

    def keep(tensor):
        alive.append(tensor.detach())
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    batch = task.examples.fetch(list(range(count)), list(range(count)))
    noise = task.draw_noise(count, torch.Generator())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task(batch, noise, 0)
    task.discard_step()
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("name", MAKERS)
def test_the_bytes_of_a_batch_follow_from_those_of_few_examples(name):
    task = MAKERS[name]().train()
    counted = measure_activations(task, SETTINGS, CPU)
    assert counted.per_example > 1000
    assert counted.count(6) == pytest.approx(count_kept(task, SETTINGS, 6), rel=0.03)


def test_recomputed_blocks_keep_their_inputs_and_one_block():
    task = MAKERS["transformer"]().train()
    whole, recomputed = (
        measure_activations(task, replace(SETTINGS, activation_checkpointing=on), CPU).per_example
        for on in (False, True)
    )
    inputs = 2 * 30 * 32 * 4  # blocks, tokens, width, bytes
    assert recomputed == pytest.approx(whole // 2 + inputs, abs=8)


def test_the_largest_divisor_that_fits_is_chosen():
    needs = Activations(constant=1000, per_example=100)
    chosen = {free: choose_micro_batch(12, needs, free) for free in (0, 1100, 1299, 1399, 1400, 1650, 2199, 2200, 9999)}
    assert list(chosen.values()) == [1, 1, 2, 3, 4, 6, 6, 12, 12]


@pytest.mark.parametrize("name", ["transformer", "adversarial"])
def test_little_memory_gives_the_run_of_a_smaller_micro_batch(name, tmp_path, monkeypatch, capfd):
    probe = MAKERS[name]()
    state = 4 * 3 * sum(p.numel() for p in probe.trained.parameters() if p.requires_grad)
    needs = measure_activations(probe.train(), SETTINGS, CPU)
    give_memory(monkeypatch, state + needs.count(3) + needs.per_example / 2)
    chosen, given = MAKERS[name](), MAKERS[name]()
    train(chosen, SETTINGS, tmp_path / "auto")
    said = [line for line in capfd.readouterr().out.splitlines() if "micro_batch auto" in line]
    assert len(said) == 1
    assert "3 of 6 images at once" in said[0]
    assert ("other micro-batches give other results" in said[0]) == (name == "adversarial")
    train(given, replace(SETTINGS, micro_batch=3), tmp_path / "given")
    assert "micro_batch auto" not in capfd.readouterr().out
    assert all(torch.equal(weights(chosen)[n], tensor) for n, tensor in weights(given).items())
    note = json.loads((tmp_path / "auto/training" / f"{chosen.name}-00000008.json").read_text())
    assert (note["micro_batch"], note["workers"]) == (3, 0)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_keeps_its_micro_batch(recorded, tmp_path, monkeypatch, capfd):
    """With less memory than before, bit for bit. A version that did not record it computed all at once."""
    whole, first, second = (MAKERS["transformer"]() for _ in range(3))
    train(whole, replace(SETTINGS, micro_batch=3 if recorded else 0), tmp_path / "whole")
    break_off(first, 5)
    with pytest.raises(KeyboardInterrupt):
        train(first, replace(SETTINGS, micro_batch=3 if recorded else 0), tmp_path / "parts")
    if not recorded:
        for path in (tmp_path / "parts/training").glob("*0*.json"):
            note = json.loads(path.read_text())
            path.write_text(json.dumps({n: v for n, v in note.items() if n not in ("micro_batch", "workers")}))
    give_memory(monkeypatch, 0)
    train(second, SETTINGS, tmp_path / "parts", accept_changes=True)
    assert f"{3 if recorded else 6} of 6 images at once (micro_batch auto: as this run" in capfd.readouterr().out
    assert all(torch.equal(weights(second)[n], tensor) for n, tensor in weights(whole).items())


MPS_ERROR = RuntimeError(
    "MPS backend out of memory (MPS allocated: 8.45 GiB, other allocations: 1.02 MiB, max allowed: 9.07 GiB). Tried to "
    "allocate 1.50 GiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
    "allocations (may cause system failure)."
)


def limit_rows(task, most, error=torch.OutOfMemoryError("CUDA out of memory.")):  # noqa: B008
    """Let the task run out of memory as a GPU does: with more than so many examples. Returns the sizes that it sees."""
    seen = []

    class Limited(type(task)):
        def forward(self, batch, noise, step):
            loss = super().forward(batch, noise, step)
            rows = len(next(iter(batch.values())))
            seen.append(rows)
            if rows > most:
                raise error
            return loss

    task.__class__ = Limited
    return seen


@pytest.mark.parametrize("name", MAKERS)
def test_a_first_step_that_runs_out_of_memory_leaves_no_trace(name, tmp_path, monkeypatch, capfd):
    """The run is that of the smaller micro-batch from the start, bit for bit."""
    given = MAKERS[name]()
    train(given, replace(SETTINGS, steps=4, batch_size=12, micro_batch=3), tmp_path / "given")
    monkeypatch.setattr(loop, "runs_out_with_an_error", lambda device: True)
    tried = MAKERS[name]()
    seen = limit_rows(tried, 5)
    train(tried, replace(SETTINGS, steps=4, batch_size=12), tmp_path / "tried")
    out = capfd.readouterr()
    lines = [line for line in (out.out + out.err).splitlines() if line.startswith("memory:")]
    assert lines == [
        "memory: 12 images at once are too many for cpu; trying 6",
        "memory: 6 images at once are too many for cpu; trying 3",
    ]
    assert seen[2:] == [12, 6, 3, 3] + [3] * 16  # tried, trained
    for other, tensor in weights(given).items():
        assert torch.equal(weights(tried)[other], tensor), other
    note = json.loads((tmp_path / "tried/training" / f"{tried.name}-00000004.json").read_text())
    assert note["micro_batch"] == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MPS_ERROR, RuntimeError("Invalid buffer size: 9.0 GiB")])
def test_a_smaller_micro_batch_is_tried_after_the_errors_of_cuda_and_mps(error, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop, "runs_out_with_an_error", lambda device: True)
    task = MAKERS["transformer"]()
    seen = limit_rows(task, 5, error)
    train(task, replace(SETTINGS, steps=1, batch_size=12), tmp_path)
    assert seen[2:] == [12, 6, 3, 3, 3, 3, 3, 3]
    assert "6 images at once are too many for cpu; trying 3" in "".join(capfd.readouterr())


def test_another_error_of_the_first_step_is_no_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "runs_out_with_an_error", lambda device: True)
    task = MAKERS["transformer"]()
    limit_rows(task, 5, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(task, replace(SETTINGS, batch_size=12), tmp_path)


def test_one_example_that_is_too_much_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "runs_out_with_an_error", lambda device: True)
    task = MAKERS["transformer"]()
    monkeypatch.setattr(memory, "measure_activations", lambda *arguments: None)
    limit_rows(task, 0)
    with pytest.raises(UserError, match="cpu ran out of memory with 1 images at once: it takes a smaller model"):
        train(task, SETTINGS, tmp_path)


def train_by_two(folder: Path) -> None:
    """One of two processes; rank 1 has memory for more examples than rank 0."""
    with init_distributed("cpu") as world:
        task = MAKERS["transformer"]().train()
        parameters = sum(p.numel() for p in task.trained.parameters())
        needs = memory.measure_activations(task, SETTINGS, world.device)
        # weights are there; gradients twice for DDP, and two moments are not
        free = 2 * (4 * 4 * parameters + needs.count(2 + 2 * world.rank) + needs.per_example / 2)
        memory.measure_memory = lambda device: (int(free), 0)
        train(task, replace(SETTINGS, batch_size=8, steps=2), folder, world=world)


def test_processes_agree_on_the_least(tmp_path):
    """The second would take 4 of its 4 examples at once, the first 2."""
    ended = [process.end() for process in forked.start_all(2, train_by_two, tmp_path, files=tmp_path / "said")]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "2 of 4 images at once" in ended[0][1]
    assert json.loads((tmp_path / "training/transformer-00000002.json").read_text())["micro_batch"] == 2


def test_the_memory_of_this_machine():
    free, total = measure_memory(CPU)
    assert 2**20 < free < total < 2**50
    assert measure_memory(torch.device("meta")) is None


class Decoding(MemoryExamples):
    decodes = True


def test_workers_leave_a_core_to_each_process_and_none_where_nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(memory, "count_cores", lambda: 16)
    gpu, images, tokens = torch.device("cuda", 0), Decoding(x=torch.zeros(1)), MemoryExamples(x=torch.zeros(1))
    found = {n: choose_workers(images, gpu, n) for n in (1, 2, 4, 8, 16, 32)}
    assert found == {1: 8, 2: 7, 4: 3, 8: 1, 16: 0, 32: 0}
    assert all(workers * n <= 16 - n for n, workers in found.items() if n <= 16)
    assert [choose_workers(images, CPU, n) for n in (1, 8, 16)] == [1, 1, 0]
    assert choose_workers(tokens, gpu, 1) == 0


def test_images_that_are_decoded_train_alike_with_and_without_workers(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(memory, "count_cores", lambda: 2)
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    examples, _, _ = open_dataset(str(tmp_path / "images"), 8, DataConfig(random_crop=True, flip=True), seed=0)
    assert examples.decodes
    found = {}
    for workers in ("auto", 0):
        task = MAKERS["tokenizer"]()
        task.examples = examples
        train(task, replace(SETTINGS, workers=workers), tmp_path / str(workers))
        assert ("1 data workers (workers auto)" in capfd.readouterr().out) == (workers == "auto")
        found[workers] = weights(task)
        note = json.loads((tmp_path / str(workers) / "training/tokenizer-00000008.json").read_text())
        assert note["workers"] == (1 if workers == "auto" else 0)
    assert all(torch.equal(found["auto"][name], tensor) for name, tensor in found[0].items())


def test_settings_are_auto_or_numbers():
    assert from_dict(TrainConfig, {"micro_batch": "auto", "workers": 2}).workers == 2
    assert from_dict(TrainConfig, {"micro_batch": 0}).split_batch(1) == [[slice(0, 64)]]
    with pytest.raises(UserError, match="micro_batch is 'all'; it must be auto, or a number"):
        from_dict(TrainConfig, {"micro_batch": "all"})
    with pytest.raises(UserError, match="workers must be auto or at least 0; got workers=-1"):
        TrainConfig(workers=-1)
    assert count_cores() >= 1


# ---- what --dry-run and the recipes say


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "mixture", "guided", "mvar"])
def test_counts_without_storage_are_those_of_real_tensors(name, precision):
    """Beside the distinct storages that autograd keeps of a real training pass, without the weights."""
    settings = {
        "dense": {},
        "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
        "guided": {"alignment": AlignmentConfig(width=6, hidden=64)},
        "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)},
    }[name]
    config = tiny_config("1,2,3,4", depth=3, width=64, **settings)
    guided = 3 if name == "guided" else 0
    model = randomised(config, backend="plain").transformer
    sizes, alive = {}, []

    def keep(tensor):
        alive.append(tensor.detach())
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        logits = model(torch.zeros(6, dtype=torch.int64), torch.zeros(6, 29, 4), aligned_scales=guided).logits_BNV
        F.cross_entropy(logits.float().flatten(0, 1), torch.zeros(6 * 30, dtype=torch.int64))
    own = {p.data_ptr() for p in model.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in own)
    counted = count_activations(build_on_meta(config)[1], replace(SETTINGS, precision=precision), guided)
    assert counted.count(6) == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 5, "alignment": AlignmentConfig(width=6, hidden=64, block=3)},
        {"depth": 5, "mixers": MVAR_MIXERS, "global_blocks": 2, "mamba": MambaConfig(state_width=6, head_width=8)},
        {"depth": 4, "shared_adaln": True, "experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    ],
)
def test_blocks_that_are_alike_count_as_if_each_were_computed(settings, monkeypatch):
    _, model = build_on_meta(tiny_config("1,2,3,4", **settings))
    once = count_activations(model, SETTINGS, 2)
    monkeypatch.setattr(activations, "_count_repeats", lambda blocks: [1] * len(blocks))
    assert once == count_activations(model, SETTINGS, 2)


GENERATORS = [name for name in RECIPES if name.startswith(("var", "mvar", "mepa"))]


@pytest.mark.parametrize("recipe", GENERATORS)
def test_recipes_say_on_which_gpus_they_fit(recipe):
    line = describe_gpus(read_settings(RunConfig, Path(recipe)))
    assert f"# {line}" in (RECIPE_FOLDER / f"{recipe}.yaml").read_text().splitlines()


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(GENERATORS)))
def test_small_recipes_say_how_much_memory_they_need(recipe):
    """Weights, gradients, moments, averages and the activations of all images at once, in float32."""
    config = read_settings(KINDS.get(recipe.split("-")[0], RunConfig), Path(recipe))
    task = build_small_task(config).train()
    train = replace(config.train, precision="float32")
    parameters = sum(p.numel() for p in task.trained.parameters() if p.requires_grad)
    needs = count_state_bytes(train, parameters) + measure_activations(task, train, CPU).count(train.batch_size)
    text = (RECIPE_FOLDER / f"{recipe}.yaml").read_text()
    said = re.search(r"# Memory for all (\d+) images at once, in float32: (\d+) MiB\.\n", text)
    assert said, text
    assert int(said[1]) == train.batch_size
    assert int(said[2]) == pytest.approx(needs / 2**20, rel=0.05)


def build_small_task(config):
    """The recipe's task, with images of its size that hold nothing."""

    def images(side):
        image = torch.zeros(3, 3, side, side, dtype=torch.uint8)
        return MemoryExamples(image=image, label=torch.zeros(3, dtype=torch.int64))

    if isinstance(config, TokenizerRunConfig):
        pyramid = derive_pyramid(config.image_size, config.tokenizer.downsampling, config.scales)
        tokenizer, _ = build_modules(ModelConfig(pyramid, config.tokenizer, None))
        return TokenizerTask(tokenizer, images(config.image_size), config.losses, config.codebook)
    if isinstance(config, ClassifierRunConfig):
        model = Classifier(config.classifier, tuple("abcdefghij"))
        return ClassifierTask(model, images(config.classifier.image_size), config.shift, 0.1)
    if isinstance(config, EncoderRunConfig):
        return create_encoder_task(config.encoder, images(config.encoder.image_size), config.moco, config.views, 0)
    base, _ = read_config(ROOT / "models" / ("var-cifar10" if config.lora.on else "tokenizer-cifar10"))
    model = base if config.lora.on else replace(base, transformer=config.fit(10, base.image_size, 0), class_names=())
    tokenizer, transformer = build_modules(model)
    if config.lora.on:
        add_adapters(transformer, config.lora, torch.zeros(1, model.transformer.width), torch.Generator())
    tokens = torch.zeros(3, model.pyramid.length, dtype=torch.int64)
    examples = MemoryExamples(tokens=tokens, label=torch.zeros(3, dtype=torch.int64))
    return TransformerTask(transformer, tokenizer, examples, config.train)


def test_a_dry_run_says_on_how_many_devices_of_which_memory_it_fits(capsys):
    """The count at the limit: one image more than the table says does not fit."""
    assert main(["train", "mepa-d16", "--out", "none", "--dry-run"]) == 0
    rows = re.findall(r"(\d) devices?, sharding (\w+) +of (\d+) +(\d+) +(\d+) +(\d+) +(\d+)", capsys.readouterr().out)
    assert [row[:3] for row in rows] == [("1", "none", "768"), ("8", "none", "96"), ("8", "full", "96")]
    config = read_settings(RunConfig, Path("mepa-d16"))
    model = replace(ModelConfig(), transformer=config.fit(1000, (256, 256), 768))
    _, transformer = build_on_meta(model)
    needs, parameters = (
        count_activations(transformer, config.train, 8),
        sum(p.numel() for p in transformer.parameters()),
    )
    for devices, sharding, share, *counts in rows:
        divided = parameters if sharding == "full" else 0
        twice = 1 if devices == "8" and sharding == "none" else 0
        held = 4 * (4 * divided / int(devices) + (4 + twice) * (parameters - divided))
        for size, count in zip((16, 24, 40, 80), map(int, counts), strict=True):
            free = 0.9 * size * GIB - held
            larger = min((n for n in range(count + 1, int(share) + 1) if int(share) % n == 0), default=None)
            assert not count or needs.count(count) <= free
            assert larger is None or needs.count(larger) > free
