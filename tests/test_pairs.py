"""Every pair of the settings that make sampling cheaper composes as plain PyTorch says, or is refused with a reason."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from nextscale.tune.options import choose_base, combine_options, list_options
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline

LABELS = [0, 3, None]
SETTINGS = {
    "guidance that ends": {"cfg": (0.0, 2.0, 0.0, 0.0)},
    "prune": {"prune": (0.5,), "prune_first_block": 1},
    "refiner": {"draft_scales": 2},
    "tau": {"tau": (0.6, 0.4)},
    "filters": {"top_k": 6, "top_p": 0.7},
    "strengths": {"cfg": (0.0, 1.0, 3.0, 3.0), "temperature": 0.8},
}
REFUSED = {
    ("prune", "refiner"): "draft_scales and prune cannot be combined",
    ("refiner", "tau"): "the refiner generates this scale, and its FFNs are not divided into experts",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    checkpoint = dynamic_pipeline(router_fingerprint="").to_checkpoint()
    model = checkpoint.config.transformer
    trained = replace(model.dynamic, router_fingerprint=compute_router_fingerprint(checkpoint.transformer, model))
    config = replace(checkpoint.config, transformer=replace(model, dynamic=trained))
    write_checkpoint(folder / "model", replace(checkpoint, config=config))
    randomised(tiny_config(depth=1)).save_pretrained(folder / "small")
    return folder


@pytest.fixture(scope="module")
def pipelines(places):
    """The fast modules, and plain PyTorch, in float32."""
    return [Pipeline.from_pretrained(places / "model", dtype="float32", backend=b) for b in ("auto", "plain")]


PAIRS = [pair for pair in itertools.combinations(SETTINGS, 2) if pair != ("guidance that ends", "strengths")]


@pytest.mark.parametrize("pair", PAIRS, ids=" with ".join)
def test_pairs_compose_or_are_refused(pair, places, pipelines):
    changes = SETTINGS[pair[0]] | SETTINGS[pair[1]]
    changes |= {"refiner": str(places / "small")} if "refiner" in pair else {}
    if pair in REFUSED:
        with pytest.raises(UserError, match=REFUSED[pair]):
            pipelines[0].sample(LABELS, SampleConfig(**changes))
        return
    settings = replace(SampleConfig(seed=5), **changes)
    fast, plain = (pipeline.sample(LABELS, settings) for pipeline in pipelines)
    assert torch.equal(fast.tokens, plain.tokens)
    torch.testing.assert_close(fast.tensor, plain.tensor, atol=1e-4, rtol=0)
    for name in pair:
        one = {n: v for n, v in changes.items() if n not in SETTINGS[name]}
        if name != "refiner":  # without draft_scales it would be refused
            assert not torch.equal(fast.tensor, pipelines[0].sample(LABELS, SampleConfig(seed=5, **one)).tensor), name


def test_what_tune_combines_runs(places):
    """One option of each kind, in all pairs, of a model with dynamic experts and of one without."""
    for model in ("model", "small"):
        config = Pipeline.from_pretrained(places / model).config
        settings = SampleConfig(cfg=2.0, refiner=str(places / "small"))
        base = replace(choose_base(config, settings), refiner="")
        kinds = {option.axis: option for option in list_options(config, (0.0, 1.0, 2.0, 2.0), settings)}
        pairs = [c for c in combine_options(list(kinds.values()), base) if len(c.options) == 2]
        loaded = {c.dtype: Pipeline.from_pretrained(places / model, dtype=c.dtype, device="cpu") for c in pairs}
        for candidate in pairs:
            images = loaded[candidate.dtype].sample(LABELS, candidate.change(base))
            assert images.tensor.isfinite().all()
