"""Adapting a model: nothing changed means nothing changed; what is new is resampled, mapped, and trains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.checkpoints.adapt import NewClass, adapt, match_scales, parse_classes, resample_map
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.official import import_official
from nextscale.checkpoints.official_shapes import Hints
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.training import TrainConfig
from nextscale.data.examples import MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, Pyramid
from nextscale.training.engine.loop import train
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config
from tests.test_tokenizer import cubic_matrix


def test_identity_is_bit_equal(official):
    before = import_official(*official.files, Hints(heads=official.meta["num_heads"]))
    count = official.meta["num_classes"]
    after = adapt(before, [NewClass(str(i), i) for i in range(count)], before.config.pyramid)
    for part in ("tokenizer", "transformer"):
        ours, theirs = getattr(after, part), getattr(before, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items())
    old, new = Pipeline.from_checkpoint(before), Pipeline.from_checkpoint(after)
    io = official.io
    inputs = io["out.teacher_forcing_input"]
    with torch.no_grad():
        assert torch.equal(
            new.transformer(io["in.label"], inputs).logits_BNV, old.transformer(io["in.label"], inputs).logits_BNV
        )
    assert torch.equal(new.sample(io["in.label"]).tensor, old.sample(io["in.label"]).tensor)


def test_classes_mapped_and_new():
    before = randomised(tiny_config()).to_checkpoint()
    after = adapt(before, [NewClass("a", 3), NewClass("b"), NewClass("c")], None, seed=1)
    old, new = (c.transformer["condition.embedding.weight"] for c in (before, after))
    assert new.shape == (4, 32)
    assert torch.equal(new[0], old[3])
    assert torch.equal(new[3], old[5]), "the last row means no label and stays"
    assert (new[1] - old[:5].mean(0)).std() < 2 / np.sqrt(3 * 32)
    assert not torch.equal(new[1], new[2])
    assert after.config.class_names == ("a", "b", "c")
    assert Pipeline.from_checkpoint(after).sample(["b", None]).tensor.isfinite().all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_resampling_against_matrices(h, w, h2, w2):
    old = torch.randn(1, h * w, 3)
    new = resample_map(old, (h, w), (h2, w2))
    maps = old[0].T.reshape(3, h, w).double().numpy()
    expected = cubic_matrix(h, h2) @ maps @ cubic_matrix(w, w2).T
    np.testing.assert_allclose(new[0].T.reshape(3, h2, w2).numpy(), expected, atol=1e-5)


def test_scales_are_matched_by_progress():
    assert match_scales(PYRAMID_256, PYRAMID_512) == list(range(10))
    assert match_scales(Pyramid.parse("1,2,3"), Pyramid.parse("1,2,3,4,5")) == [0, 0, 1, 1, 2]
    assert match_scales(Pyramid.parse("1,2,4"), Pyramid.parse("4")) == [2]


def test_another_aspect_trains_a_step_and_samples(tmp_path, tiny_folder):
    target = tmp_path / "wide"
    arguments = ["adapt", tiny_folder, "--classes", "cat=2,dog", "--scales", "1,1x2,2x4,3x6", "--out", target]
    assert main([str(a) for a in arguments]) == 0
    pipeline = Pipeline.from_pretrained(target, backend="plain")
    assert pipeline.config.image_size == (6, 12)
    assert pipeline.sample(["dog"]).tensor.shape == (1, 3, 6, 12)
    tokens = pipeline.encode(torch.rand(8, 3, 6, 12))
    config = TrainConfig(steps=3, batch_size=4, log_every=1)
    examples = MemoryExamples(tokens=tokens, label=torch.arange(8) % 2)
    train(TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, config), config, tmp_path / "run")
    assert np.isfinite([r["loss"] for r in read_log(tmp_path / "run" / "log.jsonl")]).all()
    assert pipeline.sample(["cat"]).tensor.isfinite().all()


def test_kept_scales_keep_their_positions():
    before = randomised(tiny_config("1,2,3,4")).to_checkpoint()
    after = adapt(before, None, Pyramid.parse("1,2,3,8"))
    assert torch.equal(after.transformer["pos_embed"][:, :14], before.transformer["pos_embed"][:, :14])
    assert after.transformer["pos_embed"].shape == (1, 14 + 64, 32)
    changed = {n for n, t in after.transformer.items() if not torch.equal(t, before.transformer[n])} - {"pos_embed"}
    assert changed == set()


def test_class_syntax(tiny_folder):
    config = read_checkpoint(tiny_folder).config
    assert parse_classes("3", config) == (NewClass("0"), NewClass("1"), NewClass("2"))
    assert parse_classes("cat=4, dog", config) == (NewClass("cat", 4), NewClass("dog"))
    mistakes = {"cat=,dog": "neither NAME nor NAME=OLD", "a,,b": "empty entry", "cat=9": "label 9 is out of range"}
    for wrong, message in mistakes.items():
        with pytest.raises(UserError, match=message):
            parse_classes(wrong, config)
