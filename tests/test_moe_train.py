"""Training mixtures of experts with semantic guidance: the same promises of the trainer, and the command line."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.registry import ROUTERS
from nextscale.config.log import read_log
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import MVAR_MIXERS, AlignmentConfig, ConditionConfig, ExpertsConfig, MambaConfig
from nextscale.config.transformer_training import LossConfig, RunConfig
from nextscale.data.cache import TokenCache
from nextscale.pipeline import Pipeline
from nextscale.training.components import _load_guidance
from nextscale.training.engine.loop import train
from tests.conftest import losses_by_precision, randomised, tiny_config
from tests.test_data import write_folder
from tests.test_guidance import build_task

pytestmark = pytest.mark.usefixtures("seeded")

SETTINGS = TrainConfig(
    steps=8, batch_size=6, micro_batch=4, warmup_steps=2, log_every=1, save_every=3, drop_path=0.2, ema=0.5
)
LOSS = LossConfig(encoder="cache", group="small", balance=0.1)


def tensors(task):
    return {n: t.clone() for n, t in task.trained.state_dict().items()}


MVAR = {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)}


@pytest.mark.parametrize(("router", "mixers"), [*((router, {}) for router in ROUTERS.names), ("shared", MVAR)])
def test_interrupted_and_resumed_equals_uninterrupted(router, mixers, tmp_path):
    """Bit for bit with experts, guidance and averages, in the middle of an epoch, with a fresh process's modules."""
    whole = build_task(router, LOSS, config=SETTINGS, **mixers)
    train(whole, SETTINGS, tmp_path / "whole")

    class StopAfterFive(type(whole)):
        def forward(self, batch, noise, step):
            if step == 5:
                raise KeyboardInterrupt
            return super().forward(batch, noise, step)

    first = build_task(router, LOSS, config=SETTINGS, **mixers)
    first.__class__ = StopAfterFive
    with pytest.raises(KeyboardInterrupt):
        train(first, SETTINGS, tmp_path / "parts")
    second = build_task(router, LOSS, config=SETTINGS, **mixers)
    for tensor in second.trained.state_dict().values():
        tensor.fill_(9)  # all must come from the state
    train(second, SETTINGS, tmp_path / "parts")
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensors(second)[name], tensor), name
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "parts")]
    for record in logs[0] + logs[1]:
        record.pop("images_per_s"), record.pop("tokens_per_s")
    assert logs[0] == logs[1]
    assert {"cross_entropy", "guidance", "balance", "expert_load", "loss_per_scale"} <= logs[0][0].keys()


@pytest.mark.parametrize("router", ROUTERS.names)
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_sum_up_to_the_whole_batch(router, micro_batch, tmp_path):
    """Gradients and logged values; also where micro-batches differ in size (6 = 4 + 2)."""
    found = {}
    for size in (0, micro_batch):
        config = replace(SETTINGS, steps=1, clip=0.0, micro_batch=size, drop_path=0.3, label_drop=0.3)
        task, grads = build_task(router, LOSS, config=config), {}

        def note_gradients(optimizer, arguments, options, task=task, grads=grads):
            grads.update({n: p.grad for n, p in task.trained.named_parameters()})

        handle = register_optimizer_step_pre_hook(note_gradients)
        try:
            train(task, config, tmp_path / str(size))
        finally:
            handle.remove()
        assert all(g is not None for g in grads.values()), [n for n, g in grads.items() if g is None]
        (values,) = read_log(tmp_path / str(size) / "log.jsonl")
        found[size] = grads, {n: v for n, v in values.items() if n not in ("task", "images_per_s", "tokens_per_s")}
    for name, whole in found[0][0].items():
        error = (found[micro_batch][0][name] - whole).abs().max() / whole.abs().max().clamp_min(1e-3)
        assert error <= 2e-5, f"{name}: {error:.1e}"
    for name, whole in found[0][1].items():
        assert found[micro_batch][1][name] == pytest.approx(whole, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("router", ROUTERS.names)
def test_lower_precision_stays_near_and_recomputation_changes_nothing(router, tmp_path):
    settings = replace(SETTINGS, steps=4)
    losses = losses_by_precision(lambda config: build_task(router, LOSS, config=config), settings, tmp_path)
    for name in ("bfloat16", "float16"):
        assert losses[name] == pytest.approx(losses["float32"], abs=0.1)


def test_training_with_guidance_learns_both(tmp_path):
    """On labels that decide tokens and features, both losses fall far below their beginnings."""
    task = build_task("stmoe", replace(LOSS, group="last", balance=0.01))
    tensors_ = task.examples.tensors
    tensors_["tokens"] = (tensors_["label"][:, None] * 5).expand(-1, 30).contiguous()
    directions = torch.nn.functional.one_hot(tensors_["label"], 6).half()
    tensors_["features"] = directions[:, None, None, :].expand(-1, 4, 4, -1).contiguous()
    config = TrainConfig(steps=70, batch_size=10, learning_rate=1e-2, label_drop=0.0, warmup_steps=5, log_every=10)
    train(task, config, tmp_path)
    first, last = (read_log(tmp_path / "log.jsonl")[i] for i in (0, -1))
    assert last["cross_entropy"] < 0.3 * first["cross_entropy"]
    assert last["guidance"] < -0.8 < first["guidance"]


def test_the_balance_loss_evens_the_load(tmp_path):
    """All tokens begin with the same two of four experts; with the loss the others are found, without it they are not
    nearly as much."""
    variance = {}
    for weight in (0.0, 1.0):
        task = build_task("stmoe", LossConfig(balance=weight), features=False)
        with torch.no_grad():
            for block in task.model.blocks:
                block.ffn.router.score.weight.mul_(0.05)
                block.ffn.router.scale_embed.weight.fill_(1)
                block.ffn.router.score.weight[:2] += 0.1
        config = TrainConfig(steps=30, batch_size=10, learning_rate=1e-2, label_drop=0.0, warmup_steps=2, log_every=30)
        train(task, config, tmp_path / str(weight))
        load = read_log(tmp_path / str(weight) / "log.jsonl")[-1]["expert_load"]
        assert sum(load) == pytest.approx(64, rel=1e-4)
        variance[weight] = torch.tensor(load).var().item()
    assert variance[1.0] < 0.25 * variance[0.0], variance


# ---- the command line

CONFIG = {
    "transformer": {"depth": 2, "width": 32, "heads": 4, "alignment": {"hidden": 8},
                    "experts": {"router": "stmoe", "count": 4, "active": 2}},
    "images": {"held_out": 0.25},
    "loss": {"group": "2,3"},
    "train": {"steps": 4, "batch_size": 6, "micro_batch": 3, "save_every": 2, "log_every": 1, "warmup_steps": 1,
              "precision": "bfloat16"},
}  # fmt: skip
TRAIN = "train c.json --data photos --tokenizer tokenizer --out run --device cpu"


def run(text: str) -> int:
    return main(text.split())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Pictures, a tokenizer, an encoder and a config: made once."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("moe")
    write_folder(folder / "photos")
    randomised(tiny_config()).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.Dinov2Model(transformers.Dinov2Config(**small, patch_size=2, image_size=8)).save_pretrained(
        folder / "encoder"
    )
    (folder / "c.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A fresh folder with all that, as the working directory."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_pictures_and_from_a_cache_with_features(place, capsys):
    """Both ways guide by the same features (the cache rounds them to 16 bits), validate, sample and resume."""
    tokenize = "tokenize photos --tokenizer tokenizer --images.held-out 0.25 --device cpu --out"
    assert run(f"{tokenize} cache --encoder encoder") == 0
    assert run(f"{TRAIN} --loss.encoder encoder") == 0
    assert run(TRAIN.replace("photos", "cache").replace("run", "cached") + " --loss.encoder cache") == 0
    direct, cached = ([r for r in read_log(place / n / "log.jsonl") if "loss" in r] for n in ("run", "cached"))
    assert [r["guidance"] for r in direct] == pytest.approx([r["guidance"] for r in cached], abs=2e-3)
    assert direct[0]["cross_entropy"] == cached[0]["cross_entropy"]
    validation = [r for r in read_log(place / "run" / "log.jsonl") if "validation_loss" in r][-1]
    assert validation["validation_loss"] == pytest.approx(validation["validation_cross_entropy"])
    assert len(validation["validation_expert_load"]) == 4
    assert -2 <= validation["validation_guidance"] <= 2
    model = Pipeline.from_pretrained(place / "run").config.transformer
    assert (model.alignment.width, model.alignment.hidden, model.experts.count) == (12, 8, 4)
    assert run("sample run --labels dog,none --out grid.png") == 0
    # as if killed after step 2
    before = (place / "cached" / "transformer.safetensors").read_bytes()
    for path in (place / "cached" / "training").glob("*4.pt"):
        path.unlink()
    (place / "cached" / "finished.json").unlink()
    (place / "cached" / "transformer.safetensors").write_bytes(b"gone")
    assert run("resume cached --device cpu") == 0
    assert (place / "cached" / "transformer.safetensors").read_bytes() == before
    # fine-tuned without guidance: the head comes along, untouched
    capsys.readouterr()
    tune = "train c.json --data photos --start run --out tuned --device cpu"
    assert run(tune) == 0
    old, new = (Pipeline.from_pretrained(place / n, backend="plain").transformer.state_dict() for n in ("run", "tuned"))
    assert all(torch.equal(new[n], t) for n, t in old.items() if n.startswith("projector."))
    assert any(not torch.equal(new[n], t) for n, t in old.items())


def test_what_guidance_wants_is_named(place, capsys):
    def error():
        lines = capsys.readouterr().err.strip().splitlines()
        (line,) = [line for line in lines if line.startswith("nextscale: error: ")]
        return line

    tokenize = "tokenize photos --tokenizer tokenizer --device cpu --out"
    assert run(f"{tokenize} plain") == 0
    assert run(f"{TRAIN} --loss.encoder cache") == 2
    assert "loss.encoder is 'cache', but photos is no token cache; name an encoder" in error()
    assert run(f"{TRAIN.replace('photos', 'plain')} --loss.encoder encoder") == 2
    assert "plain is a token cache: features must be in it (make it with `nextscale tokenize --encoder enc" in error()
    assert run(f"{TRAIN.replace('photos', 'plain')} --loss.encoder cache") == 2
    assert "plain holds no features: make it anew with `nextscale tokenize --encoder ENCODER`" in error()
    assert run(f"{TRAIN} --loss.encoder photos") == 2
    assert re.search("encoder from 'photos'|photos holds no encoder", error())
    assert run(f"{TRAIN} --loss.encoder encoder --loss.group 7") == 2
    assert "loss.group is '7'; give one of last, large, intermediate, small, or scales from 1 to 4, as 3,4" in error()
    assert not (place / "run" / "transformer.safetensors").exists()


def test_the_target_s_width_is_that_of_the_features(place, capsys):
    """And a start whose head is of another width is refused; one without a head gets a new one."""
    assert run("tokenize photos --tokenizer tokenizer --device cpu --out cache --encoder encoder") == 0
    examples = TokenCache(place / "cache").load_examples("train")
    assert _load_guidance(RunConfig(), examples, World()) == (None, 0)
    assert _load_guidance(RunConfig(data="cache", loss=LossConfig(encoder="cache")), examples, World()) == (None, 12)
    experts = ExpertsConfig(router="smoe", count=2, active=1)
    for width in (0, 5):
        head = AlignmentConfig(width=width, hidden=4)
        config = tiny_config(experts=experts, alignment=head, condition=ConditionConfig(num_classes=2))
        randomised(replace(config, class_names=("cat", "dog"))).save_pretrained(place / f"start{width}")
        shutil.copy(place / "tokenizer" / "tokenizer.safetensors", place / f"start{width}")
    tune = "train c.json --data cache --device cpu --loss.encoder cache --start"
    capsys.readouterr()
    assert run(f"{tune} start0 --out run --dry-run") == 0
    foreseen = capsys.readouterr().out
    assert run(f"{tune} start0 --out run") == 0
    trained = Pipeline.from_pretrained(place / "run", backend="plain").transformer
    assert trained.config.alignment.width == 12
    assert f" {sum(p.numel() for p in trained.parameters()):,} parameters" in foreseen, "with the head's"
    for guide in ("--data cache --loss.encoder cache", "--data photos --loss.encoder encoder"):
        assert run(f"train c.json {guide} --tokenizer tokenizer --out none --dry-run") == 0
        assert "assumed features" not in capsys.readouterr().out, "their width is known"
    assert run(f"{tune} start5 --out other") == 2
    expected = "the alignment head of start5 was trained for features of width 5; those of cache have 12"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("router", ["smoe", "expert-choice", "moe++"])
def test_digits_by_every_other_router(router, tmp_path, monkeypatch):
    """Straight from the command line, on the bundled digits, scales of the user's own."""
    monkeypatch.chdir(tmp_path)
    randomised(tiny_config("1,2,4")).save_pretrained("tokenizer")
    (tmp_path / "c.json").write_text(json.dumps({**CONFIG, "transformer": {"depth": 2, "width": 32, "heads": 4}}))
    command = f"train c.json --data digits --images.limit 100 --transformer.experts.router {router}"
    assert run(f"{command} --tokenizer tokenizer --train.steps 2 --out run --device cpu") == 0
    model = Pipeline.from_pretrained("run").config.transformer
    assert (model.experts.router, model.experts.count, model.experts.active) == (router, 8, 3)
    record = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert len(record["expert_load"]) == 8 + model.experts.zero_computation
    assert run("sample run --labels 3 --out grid.png") == 0


def test_a_loss_that_is_not_finite_names_the_block(tmp_path):
    """An expert's weights, deep inside: found by the guard like any layer's."""
    task = build_task("stmoe", LOSS)
    with torch.no_grad():
        task.model.blocks[1].ffn.experts.fc2.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"at step 0 are not both finite; .*the first layer at fault is blocks\.1\.ffn"):
        train(task, SETTINGS, tmp_path)
