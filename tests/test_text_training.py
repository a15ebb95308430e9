"""Training on captions: as bytes from images and from a token cache, and as a frozen encoder's embeddings."""

import shutil
from dataclasses import replace

import pytest
import torch

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.data import DataConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache
from nextscale.data.captions import TextInput
from nextscale.encoders.text import load_text_encoder, load_trained_encoder
from nextscale.pipeline import Pipeline
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import sample_images
from nextscale.training.components import load_components
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config
from tests.test_captions import write_captioned
from tests.test_text_encoders import tokenize, train_spiece, write_t5

pytest.importorskip("transformers")
CROSS = ("attention", "cross-attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a captioned table, a T5 encoder, and a cache with its embeddings."""
    folder = tmp_path_factory.mktemp("text-training")
    torch.manual_seed(0)
    randomised(tiny_config()).save_pretrained(folder / "model")
    write_captioned(folder / "x.parquet")
    write_t5(folder / "t5", train_spiece())
    assert tokenize(folder, folder / "cache", folder / "t5") == 0
    return folder


def load(folder, data, condition, start=None):
    mixers = CROSS if condition.kind == "text" else CROSS[:1]
    transformer = tiny_config(condition=condition, mixers=mixers).transformer
    where = {"start": str(start)} if start else {"tokenizer": str(folder / "model")}
    return load_components(
        RunConfig(data=str(folder / data), transformer=transformer, images=DataConfig(held_out=0.25), **where), World()
    )


def compute_loss(components, batch):
    task = TransformerTask(components.transformer, components.tokenizer, components.examples, RunConfig().train)
    loss, _ = task({name: value for name, value in batch.items() if name != "unreadable"}, {}, 0)
    loss.backward()
    return loss.item()


def test_a_byte_encoder_learns_from_images_and_from_a_cache_alike(folder):
    condition = ConditionConfig("text", max_tokens=4)
    losses = []
    for data in ("x.parquet", "cache"):
        parts = load(folder, data, condition)
        batch = parts.examples.fetch(range(6), range(6))
        assert batch["text"].shape == (6, 3), "the first place of the sequence is a learned token"
        assert parts.model.transformer.condition == condition
        losses.append(compute_loss(parts, batch))
        gradient = parts.transformer.condition.tokens.embedding.weight.grad
        used = {int(byte) for row, n in zip(batch["text"], batch["text_length"], strict=True) for byte in row[:n]}
        assert {i for i in range(256) if gradient[i].any()} == used
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_embeddings_of_a_cache_decide_the_condition(folder):
    parts = load(folder, "cache", ConditionConfig("text", encoder="cache"))
    condition, head = parts.model.transformer.condition, TokenCache(folder / "cache").text
    assert (condition.encoder, condition.encoder_fingerprint) == (str(folder / "t5"), head.encoder)
    assert (condition.embedding_width, condition.max_tokens) == (16, 7)
    assert compute_loss(parts, parts.examples.fetch(range(6), range(6))) > 0
    assert parts.transformer.condition.tokens.project.weight.grad.any()


def test_a_start_checkpoint_needs_the_encoder_that_it_was_trained_with(folder, tmp_path):
    parts = load(folder, "cache", ConditionConfig("text", encoder="cache"))
    write_checkpoint(
        tmp_path / "start", Checkpoint(parts.model, parts.tokenizer_weights, parts.transformer.state_dict())
    )
    again = load(folder, "cache", ConditionConfig(), start=tmp_path / "start")
    assert again.model.transformer.condition == parts.model.transformer.condition
    assert "text" in again.examples.fetch([0], None)
    assert tokenize(folder, tmp_path / "other", folder / "t5", "--text-max-tokens", "9") == 0
    shutil.copytree(tmp_path / "other", folder / "other", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"by .*t5 with 9 tokens; the model reads others: .* --text-max-tokens 6`"):
        load(folder, "other", ConditionConfig(), start=tmp_path / "start")


def test_what_does_not_fit_together_is_refused(folder):
    with pytest.raises(UserError, match=r"is a data set of images: embeddings .* come from a token cache"):
        load(folder, "x.parquet", ConditionConfig("text", encoder="cache"))
    with pytest.raises(UserError, match="encoder must be empty unless the kind is text"):
        ConditionConfig("class", encoder="cache")
    assert TextInput.of_condition(ConditionConfig("text", source="words")) is None, "captions are the source text"
    with pytest.raises(UserError, match="is a tokenizer alone"):
        load_tokenizer_alone(folder)


def load_tokenizer_alone(folder):
    config = tiny_config()
    pipeline = randomised(config)
    write_checkpoint(
        folder / "alone", Checkpoint(replace(config, transformer=None), pipeline.tokenizer.state_dict(), {})
    )
    load(folder, "x.parquet", ConditionConfig("text"), start=folder / "alone")


# ---- the whole road: tokenize, train, sample


def run(*words):
    return main([*map(str, words)])


def test_a_model_of_a_frozen_encoder_is_trained_and_samples_from_prompts(folder, tmp_path, capsys):
    settings = ["--transformer.mixers", "attention", "cross-attention", "--transformer.condition.kind", "text"]
    settings += ["--transformer.condition.encoder", "cache", "--transformer.depth", "1", "--transformer.width", "32"]
    settings += ["--transformer.heads", "2", "--train.steps", "2", "--train.batch-size", "4", "--sampling.cfg", "1"]
    out = tmp_path / "run"
    command = ["train", "cifar10", "--data", folder / "cache", "--tokenizer", folder / "model", "--out", out, *settings]
    assert run(*command) == 0, capsys.readouterr().err
    pipeline = Pipeline.from_pretrained(out, dtype=torch.float32)
    condition = pipeline.config.transformer.condition
    assert (condition.encoder, condition.max_tokens) == (str(folder / "t5"), 7)
    prompts = ["11.0", "", "and a very long prompt that does not fit"]
    drawn = pipeline.sample(prompts=prompts, seed=3, cfg=1.5)
    batch = load_text_encoder(str(folder / "t5"), 6).encode_batch(prompts)
    values = pipeline.transformer.condition.parse((batch.text_BTE, batch.length_B))
    sampler = build_sampler(
        pipeline.tokenizer, pipeline.transformer, values, SampleConfig(seed=3, cfg=1.5), first_image=0
    )
    assert torch.equal(drawn.tensor, sample_images(sampler).images_B3HW)
    assert torch.equal(pipeline.sample(prompts=prompts[2:], first_image=2, seed=3, cfg=1.5).tensor[0], drawn.tensor[2])
    assert torch.equal(pipeline.sample(prompts=[None], first_image=1, seed=3, cfg=1.5).tensor[0], drawn.tensor[1])
    assert run("sample", out, "--prompt", "11.0", "--out", tmp_path / "x.png", "--device", "cpu") == 0
    shutil.move(folder / "t5", folder / "gone")
    load_trained_encoder.cache_clear()
    try:
        with pytest.raises(UserError, match=r"no text encoder '.*t5': expected the folder of a T5"):
            pipeline.sample(prompts=["11.0"])
        shutil.copytree(folder / "gone", folder / "t5")
        config = (folder / "t5" / "config.json").read_text()
        (folder / "t5" / "config.json").write_text(config.replace('"d_ff": 32', '"d_ff": 32, "note": 1'))
        with pytest.raises(UserError, match=r"t5 is not the text encoder that the model was trained with"):
            pipeline.sample(prompts=["11.0"])
    finally:
        shutil.rmtree(folder / "t5", ignore_errors=True)
        shutil.move(folder / "gone", folder / "t5")
