"""Guidance that ends before the last scale: equal images in fewer sequences, with everything it can meet."""

import pytest
import torch

from nextscale.backends.cuda.graphs import GraphPool
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.guidance import count_sequences, schedule_guidance
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline
from tests.test_mvar import mvar_config

LABELS = [0, 3, None]
NOTHING = 1e-30
"""A strength that changes no float32 logit, but has both halves computed."""


def build(family):
    if family == "dynamic":
        return dynamic_pipeline()
    if family == "mvar":
        return randomised(mvar_config("1,2,3,4"))
    router = family if family in ("stmoe", "expert-choice", "moe++") else "none"
    return randomised(tiny_config(experts=ExpertsConfig(router=router, count=4, active=2)))


def assert_equal_images(pipeline, strengths, **settings):
    """With trailing zeros in `strengths`, and with strengths in their place that change nothing."""
    last = max(k for k, strength in enumerate(strengths) if strength)
    everywhere = tuple(s if k <= last else NOTHING for k, s in enumerate(strengths))
    ended = pipeline.sample(LABELS, cfg=strengths, seed=3, **settings)
    whole = pipeline.sample(LABELS, cfg=everywhere, seed=3, **settings)
    assert torch.equal(ended.tokens, whole.tokens)
    assert torch.equal(ended.tensor, whole.tensor)
    return ended


@pytest.mark.parametrize("last", range(3))
@pytest.mark.parametrize("family", ["dense", "stmoe", "expert-choice", "moe++", "mvar", "dynamic"])
def test_images_equal_those_of_the_whole_computation(family, last):
    strengths = tuple(1.5 if k <= last else 0.0 for k in range(4))
    assert_equal_images(build(family), strengths)


@pytest.mark.parametrize(
    "settings",
    [
        {"prune": (0.4, 0.5), "prune_first_block": 1},
        {"prune": (0.5,), "prune_first_block": 0},
        {"smooth": True},
        {"official_seeding": True},
        {"top_k": 5, "top_p": 0.5},
    ],
)
@pytest.mark.parametrize("last", [1, 2])
def test_images_are_equal_with_other_settings(settings, last):
    assert_equal_images(build("dense"), tuple(1.5 * (k <= last) for k in range(4)), **settings)


@pytest.mark.parametrize("tau", [(0.2, 0.1), (1.0,)])
def test_images_are_equal_with_thresholds(tau):
    assert_equal_images(build("dynamic"), (0.0, 2.0, 0.0, 0.0), tau=tau)


@pytest.mark.parametrize("draft_scales", [1, 2, 3])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_images_are_equal_with_a_refiner_before_and_after_the_end_of_guidance(draft_scales, last):
    pipeline = build("dense")
    pipeline.refine_with(build("stmoe"))
    assert_equal_images(pipeline, tuple(1.5 * (k <= last) for k in range(4)), draft_scales=draft_scales)


@pytest.mark.parametrize("family", ["dense", "mvar"])
def test_captured_steps_run_fewer_sequences_at_the_later_scales(family):
    pipeline = build(family)
    settings = {"cfg": (1.0, 1.0, 0.0, 0.0), "seed": 3}
    plain = pipeline.sample(LABELS, **settings)
    pipeline.capture()
    for _ in range(2):  # the second batch finds the caches that the first one filled
        assert torch.equal(pipeline.sample(LABELS, **settings).tokens, plain.tokens)
        whole = pipeline.sample(LABELS, cfg=1.0, seed=3)
    assert not torch.equal(whole.tokens, plain.tokens)
    pool: GraphPool = pipeline._capturing.pool
    assert sorted(key[0] for key, _ in pool._idle) == [(6, 6, 3, 3), (6, 6, 6, 6)]
    shapes = {sequences: [x.shape[0] for x in steps.inputs_BNC[1:]] for (sequences, _), steps in pool._idle}
    assert shapes[6, 6, 3, 3] == [6, 3, 3]


def test_an_image_does_not_depend_on_its_batch():
    pipeline = build("dense")
    together = pipeline.sample(LABELS, cfg_scales=2, seed=8).tokens
    for i, label in enumerate(LABELS):
        assert torch.equal(pipeline.sample([label], cfg_scales=2, seed=8, first_image=i).tokens[0], together[i])


def test_fewer_guided_scales_keep_the_strengths_of_the_others():
    pyramid = Pyramid.parse("1,2,3,4,5")
    assert schedule_guidance(SampleConfig(cfg=4.0), pyramid) == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert schedule_guidance(SampleConfig(cfg=4.0, cfg_scales=3), pyramid) == (0.0, 1.0, 2.0, 0.0, 0.0)
    assert count_sequences((0.0, 1.0, 2.0, 0.0, 0.0)) == (2, 2, 2, 1, 1), "scale 0 is seen by guided ones"
    assert count_sequences((0.0, 0.0)) == (1, 1)
    assert count_sequences((0.0, 0.0, 3.0)) == (2, 2, 2)


def test_what_does_not_fit_is_refused(tiny_folder, tmp_path, capsys):
    pipeline = build("dense")
    with pytest.raises(UserError, match="cfg_scales is 9, but the model has 4 scales: give 1 to 4, or 0 for all"):
        pipeline.sample([1], cfg_scales=9)
    with pytest.raises(UserError, match="cfg_scales and a list of cfg cannot be combined"):
        pipeline.sample([1], cfg=(1, 1, 1, 1), cfg_scales=2)
    command = f"sample {tiny_folder} --labels 1 --out {tmp_path / 'a.png'} --cfg-scales 99"
    assert main(command.split()) == 2
    assert "cfg_scales is 99" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
