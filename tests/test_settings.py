"""Settings under which a part of a model learns nothing or does nothing are refused or named before a run starts."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from nextscale.cli.parser import main, parse
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.encoder import EncoderConfig, EncoderRunConfig, MocoConfig, ViewConfig
from nextscale.config.files import read_settings
from nextscale.config.idle import list_setting_notes
from nextscale.config.parse import from_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.tokenizer_training import TokenizerLossConfig, TokenizerRunConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig
from nextscale.config.transformer_training import LossConfig, RunConfig
from nextscale.data.examples import MemoryExamples
from nextscale.encoders.classifier import Classifier
from nextscale.training.classifier import ClassifierTask
from nextscale.training.encoder import create_encoder_task
from nextscale.training.engine.loop import train
from nextscale.training.engine.task import Task
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config

RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "nextscale" / "config" / "recipes").glob("*.yaml"))
KINDS = {"tokenizer": TokenizerRunConfig, "classifier": ClassifierRunConfig, "encoder": EncoderRunConfig}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_no_idle_setting(recipe):
    assert list_setting_notes(read_settings(KINDS.get(recipe.split("-")[0], RunConfig), Path(recipe))) == []


@pytest.mark.parametrize("kind", [*KINDS.values(), RunConfig, QuickstartConfig, SparsifyConfig, SampleConfig])
def test_defaults_have_no_idle_setting(kind):
    assert list_setting_notes(kind()) == []


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (RunConfig, {"loss": {"group": "small"}}, "loss.group"),
        (RunConfig, {"loss": {"cross_entropy": 0.1}}, "loss.cross_entropy"),
        (RunConfig, {"loss": {"shuffle": True}}, "loss.shuffle"),
        (RunConfig, {"loss": {"balance": 0.1}}, "loss.balance"),
        (RunConfig, {"loss": {"balance_over": "batch"}}, "loss.balance_over has no effect: there is no mixture"),
        (
            RunConfig,
            {"loss": {"balance_over": "batch"}, "transformer": {"experts": {"router": "smoe"}}},
            "the same experts for all images",
        ),
        (RunConfig, {"loss": {"aggregate": False}}, "loss.aggregate"),
        (
            RunConfig,
            {"transformer": {"experts": {"router": "moe++", "share_scale_embedding": True}}},
            "scale_embedding, and smoe",
        ),
        (
            RunConfig,
            {"transformer": {"experts": {"router": "stmoe", "scale_embedding": False, "share_scale_embedding": True}}},
            "share_scale_embedding has no effect",
        ),
        (RunConfig, {"loss": {"idle_balance": 0.1}, "transformer": {"experts": {"router": "stmoe"}}}, "loss.idle"),
        (RunConfig, {"transformer": {"alignment": {"hidden": 5, "block": 1}}}, "alignment.hidden, transformer.align"),
        (RunConfig, {"transformer": {"condition": {"num_classes": 3}}}, "condition.num_classes has no effect: it is"),
        (RunConfig, {"transformer": {"experts": {"count": 4}}}, "transformer.experts.count"),
        (RunConfig, {"transformer": {"experts": {"router": "smoe", "zero": 4}}}, "transformer.experts.zero"),
        (RunConfig, {"transformer": {"experts": {"router": "moe++", "scale_embedding": False}}}, "scale_embedding"),
        (RunConfig, {"transformer": {"experts": {"router": "stmoe", "count": 1, "active": 1}}}, "nothing to choose"),
        (
            RunConfig,
            {"transformer": {"experts": {"router": "stmoe", "active": 1, "renormalise": True}}},
            "learns from the load-balance loss alone",
        ),
        (RunConfig, {"transformer": {"experts": {"router": "stmoe", "active": 8}}}, "nothing is routed"),
        (RunConfig, {"transformer": {"mamba": {"expand": 1}}}, "transformer.mamba.expand"),
        (RunConfig, {"transformer": {"global_blocks": 2}}, "transformer.global_blocks"),
        (RunConfig, {"transformer": {"global_blocks": 16, "mixers": ["scale-attention"]}}, "transformer.mixers"),
        (RunConfig, {"transformer": {"depth": 1}, "train": {"drop_path": 0.1}}, "train.drop_path has no effect"),
        (RunConfig, {"transformer": {"dynamic": {"scales": 2}}}, "transformer.dynamic.scales"),
        (RunConfig, {"start": "x", "scales": "1,2", "init": {"head": 0.1}}, "init.head, scales have no effect"),
        (RunConfig, {"train": {"label_drop": 0}}, "train.label_drop is 0: the model does not learn to generate"),
        (RunConfig, {"train": {"learning_rate": 0}}, "nothing is learned"),
        (RunConfig, {"train": {"learning_rate": 1e-6}}, "the rate rises"),
        (RunConfig, {"train": {"epochs": 2, "steps": 7}}, "train.steps has no effect: train.epochs 2"),
        (RunConfig, {"train": {"warmup_epochs": 2, "warmup_steps": 7}}, "train.warmup_steps"),
        (RunConfig, {"train": {"warmup_steps": 0, "warmup_start": 0.5}}, "train.warmup_start"),
        (RunConfig, {"train": {"flat": 0.5}}, "train.flat"),
        (RunConfig, {"train": {"micro_batch": 65}}, "train.micro_batch has no effect: train.batch_size is only 64"),
        (RunConfig, {"sampling": {"prune_first_block": 1}}, "sampling.prune_first_block"),
        (SampleConfig, {"top_k": 1, "temperature": 0.5}, "temperature has no effect: top_k 1"),
        (TokenizerRunConfig, {"train": {"label_drop": 0.5, "compile": True}}, "train.label_drop, train.compile have"),
        (TokenizerRunConfig, {"losses": {"adversarial_start": 5}}, "losses.adversarial_start"),
        (TokenizerRunConfig, {"losses": {"lpips_vgg": "x"}}, "losses.lpips_vgg"),
        (TokenizerRunConfig, {"codebook": {"ema_decay": 0.5}}, "codebook.ema_decay"),
        (TokenizerRunConfig, {"codebook": {"revive_every": 0, "revive_below": 0.5}}, "codebook.revive_below"),
        (TokenizerRunConfig, {"codebook": {"revive_every": 1001}}, "codes are not revived"),
        (TokenizerRunConfig, {"tokenizer": {"phi_ratio": 0, "num_phi": 2}}, "tokenizer.num_phi"),
        (TokenizerRunConfig, {"start": "x", "tokenizer": {"vocab_size": 5}}, "tokenizer.vocab_size"),
        (ClassifierRunConfig, {"train": {"drop_path": 0.5}}, "train.drop_path"),
        (EncoderRunConfig, {"train": {"label_smoothing": 0.5}}, "train.label_smoothing"),
        (EncoderRunConfig, {"views": {"jitter_share": 0, "hue": 0.2}}, "views.hue"),
        (
            EncoderRunConfig,
            {"views": {"smallest_crop": 1, "flip": False, "grey_share": 0, "jitter_share": 0}},
            "both views of an image are equal",
        ),
        (SparsifyConfig, {"data": "x", "samples": 99}, "samples has no effect"),
        (SparsifyConfig, {"images": {"flip": True}}, "images.flip"),
        (SparsifyConfig, {"tune": "none", "hoyer": 0.5}, "hoyer"),
        (SparsifyConfig, {"stages": ["split"], "tuning": {"epochs": 5}}, "tuning.epochs"),
        (SparsifyConfig, {"adapting": {"epochs": 5}}, "adapting.epochs has no effect: stage adapt is not run"),
        (QuickstartConfig, {"loss": {"encoder": ""}, "moco": {"queue": 2000}}, "moco.queue"),
        (QuickstartConfig, {"train_encoder": {"drop_path": 0.5}}, "train_encoder.drop_path"),
        (QuickstartConfig, {"encoder": {"image_size": 64}}, "encoder.image_size"),
    ],
)
def test_settings_without_effect_are_named(kind, settings, names):
    (note,) = [note for note in list_setting_notes(from_dict(kind, settings, base=kind())) if names in note]
    assert note.count("{") == 0


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RunConfig, {"loss": {"encoder": "x", "cross_entropy": 0}}, "cross_entropy must be above 0"),
        (RunConfig, {"transformer": {"dynamic": {"experts": 4}}}, "set by `nextscale sparsify`"),
        (RunConfig, {"transformer": {"dynamic": {"scales": 1, "tau": [0.5]}}}, "set by `nextscale sparsify`"),
        (
            QuickstartConfig,
            {"transformer": {"dynamic": {"experts": 4}, "experts": {"router": "none"}}},
            "set by `nextscale sparsify`",
        ),
        (TokenizerRunConfig, {"losses": {"l1": 0, "l2": 0}}, "the decoder would learn nothing"),
        (TokenizerRunConfig, {"losses": {"adversarial": 1}}, "adversarial_start 1,000 is not before the end"),
        (SparsifyConfig, {"budgets": [], "budget": 0}, "needs budgets or a budget"),
        (QuickstartConfig, {"max_epochs": -1}, "max_epochs must be 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        from_dict(kind, settings, base=kind())


def test_steps_that_epochs_overrule_are_refused_on_the_command_line():
    with pytest.raises(UserError, match=r"--train.steps has no effect, because the settings have train.epochs 200"):
        parse(["train", "var-d16", "--out", "x", "--train.steps", "100"])
    with pytest.raises(UserError, match=r"--tuning.steps has no effect"):
        parse(["sparsify", "model", "--out", "x", "--tuning.steps", "100"])
    given = parse(["train", "var-d16", "--out", "x", "--train.steps", "100", "--train.epochs", "0"])
    assert given.settings.train.schedule_steps(1000)[0] == 100
    assert parse(["train", "cifar10", "--out", "x", "--train.epochs", "2"]).settings.train.epochs == 2


def test_the_command_line_prints_the_notes(capsys):
    command = ["train", "cifar10", "--out", "x", "--loss.group", "small", "--dry-run"]
    assert main(command) == 0
    assert "note: loss.group has no effect: there is no guidance (loss.encoder is empty)" in capsys.readouterr().out
    assert main([word for word in command if word not in ("--loss.group", "small")]) == 0
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "examples", "text"),
    [
        ({"steps": 20}, 1000, "the warm-up takes all 20 steps"),
        ({"steps": 20, "save_every": 30}, 1000, "save_every 30 is more than the 20 steps"),
        ({"steps": 20, "sample_every": 30}, 1000, "sample_every 30"),
        ({"ema": 0.999}, 10**6, "37% of the averaged weights"),
        ({"steps": 12000, "batch_size": 32}, 57, "are 6,737 passes over 57 training examples"),
        ({}, 60, "batch_size 64 is more than the 60 training examples"),
        ({"sharding": "full"}, 10**6, "sharding full has no effect"),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(settings, examples, text):
    assert [d for d in TrainConfig(**settings).list_schedule_doubts(examples) if text in d]


def test_micro_batches_larger_than_a_process_computes_are_named():
    config = TrainConfig(micro_batch=40)
    assert "a process computes only 32" in config.list_schedule_doubts(10**6, processes=2)[0]
    assert config.list_schedule_doubts(10**6, processes=1) == []


# ---- gradients


class TwoLayers(Task):
    """A task whose second layer takes no part in the loss, and whose third has a gradient of exactly zero."""

    name = "toy"

    def __init__(self, count: int = 8):
        super().__init__()
        self.examples = MemoryExamples(x=torch.ones(count, 3))
        parts = {name: nn.Linear(3, 3) for name in ("used", "unused", "cancelled")}
        self.trained = nn.ModuleDict({**parts, "pair": nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)})})
        self.trained["frozen"] = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, batch, noise, step):
        y = self.trained["used"](batch["x"]) * self.trained["pair"]["a"] + 0 * self.trained["cancelled"](batch["x"])
        return y.sum(dim=1).mean(), {}


def test_parameters_without_gradient_are_named_by_module(tmp_path, capsys):
    train(TwoLayers(), TrainConfig(steps=2, batch_size=4, micro_batch=2, warmup_steps=0), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no gradient" in line]
    assert lines == [
        "note: after the first step, 5 of 8 trained parameters of the toy have no gradient and do not learn: "
        "unused, cancelled, pair.b"
    ]
    train(TwoLayers(), TrainConfig(steps=4, batch_size=4, warmup_steps=0), tmp_path, accept_changes=True)
    assert "no gradient" not in capsys.readouterr().out, "a resumed run has been checked"


def build_examples(pyramid, features: int = 0, count: int = 12) -> MemoryExamples:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "tokens": torch.randint(32, (count, pyramid.length), generator=rng),
        "label": torch.arange(count) % 5,
    }
    if features:
        tensors["features"] = torch.randn(count, 4, 4, features, generator=rng)
    return MemoryExamples(**tensors)


def build_images(count: int = 12, size: int = 8) -> MemoryExamples:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    return MemoryExamples(image=image, label=torch.arange(count) % 3)


def build_generator(loss: LossConfig | None = None, features: int = 0, **transformer) -> TransformerTask:
    alignment = AlignmentConfig(width=features, hidden=8)
    pipeline = randomised(tiny_config(alignment=alignment, **transformer))
    examples = build_examples(pipeline.transformer.pyramid, features)
    config = TrainConfig(drop_path=0.1)
    return TransformerTask(pipeline.transformer.float(), pipeline.tokenizer, examples, config, loss or LossConfig())


NORMAL = {
    "dense": lambda: build_generator(),
    "mixture with guidance": lambda: build_generator(
        LossConfig(encoder="cache"), 6, experts=ExpertsConfig(router="stmoe", count=4, active=2)
    ),
    "moe++": lambda: build_generator(experts=ExpertsConfig(router="moe++", count=4, active=2)),
    "smoe": lambda: build_generator(experts=ExpertsConfig(router="smoe", count=4, active=2)),
    "expert-choice": lambda: build_generator(experts=ExpertsConfig(router="expert-choice", count=4, active=2)),
    "mvar": lambda: build_generator(mixers=("scale-attention", "mamba")),
    "tokenizer": lambda: TokenizerTask(randomised(tiny_config()).tokenizer, build_images()),
    "tokenizer with discriminator": lambda: TokenizerTask(
        randomised(tiny_config()).tokenizer,
        build_images(),
        TokenizerLossConfig(adversarial=0.5, adversarial_start=0, discriminator_channels=8, discriminator_layers=1),
    ),
    "classifier": lambda: ClassifierTask(
        Classifier(dataclasses.replace(ClassifierRunConfig().classifier, image_size=8, widths=(16, 16)), tuple("abc")),
        build_images(), 1, 0.0,
    ),
    "encoder": lambda: create_encoder_task(
        EncoderConfig(image_size=8, widths=(16, 16), blocks=(1, 1)), build_images(),
        MocoConfig(queue=16, hidden=8, key_width=8), ViewConfig(), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMAL)
def test_every_parameter_of_a_normal_run_has_a_gradient(name, tmp_path, capsys):
    task = NORMAL[name]()
    train(task, TrainConfig(steps=1, batch_size=12, micro_batch=6, warmup_steps=0), tmp_path, world=World())
    assert "note" not in capsys.readouterr().out


def test_a_head_without_guidance_is_named(tmp_path, capsys):
    train(build_generator(features=6), TrainConfig(steps=1, batch_size=4, warmup_steps=0), tmp_path)
    assert "have no gradient and do not learn: projector" in capsys.readouterr().out


def test_a_phi_that_serves_no_scale_is_named_as_such(tmp_path, capsys):
    task = TokenizerTask(randomised(tiny_config("1,4")).tokenizer, build_images())
    train(task, TrainConfig(steps=1, batch_size=4, warmup_steps=0), tmp_path)
    assert "tokenizer.quantizer.phi.1 (it serves no scale), tokenizer.quantizer.phi.2 (it" in capsys.readouterr().out


def test_training_ends_with_the_averaged_weights(tmp_path):
    """What a caller saves or measures after a training is what was validated: the averages, if there are any."""
    task, config = TwoLayers(), TrainConfig(steps=3, batch_size=4, warmup_steps=0, ema=0.5, learning_rate=0.1)
    train(task, config, tmp_path)
    content = torch.load(tmp_path / "training" / "toy-00000003.pt", weights_only=True)
    weight = task.trained["used"].weight
    assert torch.equal(weight, content["ema"]["used.weight"])
    assert not torch.equal(weight, content["module"]["used.weight"])
    again = TwoLayers()
    train(again, config, tmp_path)
    assert torch.equal(again.trained["used"].weight, weight), "a finished run that is run again, too"


def test_the_quickstart_passes_over_few_images_less_often():
    default = QuickstartConfig()
    assert default.fit_to_data(1438) == default, "the digits"
    assert default.fit_to_data(16000) == default
    assert dataclasses.replace(default, max_epochs=0.0).fit_to_data(46).train_tokenizer == default.train_tokenizer
    for images in (1, 46, 100, 300, 700):
        fitted = default.fit_to_data(images)
        for name in ("train_tokenizer", "train_encoder", "train_transformer"):
            before, after = getattr(default, name), getattr(fitted, name)
            steps, warmup = after.schedule_steps(images)
            assert steps * after.batch_size <= max(30 * images, 8)
            assert warmup < steps or steps == 1
            assert steps == before.steps or after.batch_size == 8
