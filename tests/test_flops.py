"""FLOPs that sampling executed, for every setting, against torch's own counter; and the reports that state them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from nextscale.backends.cpu import products
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.evaluation.flops import FlopCounter, count_planned_flops, count_sampled_flops
from nextscale.info import as_text, describe_config, sample_flops
from nextscale.pipeline import Pipeline
from nextscale.research.experiments.entry import load_experiment
from nextscale.research.experiments.runner import ExperimentRunner, Inputs
from nextscale.sampling.sampler import sample_scales
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline
from tests.test_dynamic_flops import counting

LABELS = [0, 1, None]
MIXTURE = ExpertsConfig(router="moe++", count=4, active=2, gating_residual=False)
PRUNE = {"prune": (0.4, 0.5), "prune_first_block": 1}


@torch.no_grad()
def count_both(pipeline, settings):
    """(our count, torch's) of the transformers for one batch: their conditions and the prediction of every scale."""
    ours, theirs = FlopCounter(pipeline, settings, len(LABELS)), 0
    values = pipeline.transformer.condition.parse(LABELS)
    pipeline.load_refiner(settings)
    with counting() as counter:
        sampler = pipeline._build_sampler(values, settings, 0, ())
    theirs += counter.get_total_flops()

    def predict(x_BNC, k):
        nonlocal theirs
        with counting() as counter:
            output = sampler.predict(x_BNC, k)
        theirs += counter.get_total_flops()
        return output

    for step in sample_scales(replace(sampler, predict=predict)):
        ours.add(step)
    return ours.flops, theirs


def make_pipeline(kind):
    if kind == "dynamic":
        return dynamic_pipeline(activation="relu").optimize(training=True)
    experts = {"experts": MIXTURE} if kind == "mixture" else {}
    return randomised(tiny_config(**experts), backend="plain")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dense", {}),
        ("dense", {"cfg": 0.0, **PRUNE}),
        ("mixture", {}),
        ("mixture", {"cfg": 0.0, **PRUNE}),
        ("dynamic", {"tau": (0.5,)}),
        ("dynamic", {"tau": (0.8, 0.3), **PRUNE}),
        ("dense", {"cfg_scales": 2}),
        ("dense", {"cfg": (0.0, 2.0, 0.0, 0.0), **PRUNE}),
        ("mixture", {"cfg_scales": 3}),
        ("dynamic", {"cfg_scales": 2, "tau": (0.8, 0.3)}),
    ],
)
def test_counts_equal_torch_s(monkeypatch, kind, settings):
    monkeypatch.setattr(products, "_MIN_ROWS", 1)  # rows of padding are executed too, for independence of the batch
    monkeypatch.setattr(products, "_use_onednn", lambda x, weight: False)  # torch's counter does not know its products
    pipeline, settings = make_pipeline(kind), SampleConfig(**settings)
    ours, theirs = count_both(pipeline, settings)
    assert ours == theirs
    whole = 3 * sample_flops(pipeline.config, SampleConfig(cfg=settings.cfg, cfg_scales=settings.cfg_scales))
    assert (ours < whole) == (kind != "dense" or bool(settings.prune)), "a dense model without pruning costs all of it"


@pytest.mark.parametrize(("kind", "cfg_scales"), [("dense", 0), ("mixture", 0), ("dense", 2)])
def test_a_refiner_counts_for_the_scales_that_it_predicts(kind, cfg_scales):
    """Its first pass computes attention as a square under a mask, of which the visible part is counted."""
    pipeline, small = make_pipeline("dense"), make_pipeline(kind)
    pipeline.refine_with(small)
    settings = SampleConfig(draft_scales=2, cfg_scales=cfg_scales)
    ours, theirs = count_both(pipeline, settings)
    spans = pipeline.config.pyramid.spans[:3]
    square = spans[-1][1] ** 2 - sum((end - start) * end for start, end in spans)
    width, depth = small.config.transformer.width, small.config.transformer.depth
    sequences = 3 if cfg_scales else 6
    assert theirs == ours + sequences * 2 * 2 * width * square * depth
    executed = count_sampled_flops(pipeline, LABELS, settings, batch_size=2)
    assert executed.flops * 3 == ours, "whatever the batches are"


@pytest.fixture
def dynamic_folder(tmp_path):
    """A model with dynamic experts and a table of budgets."""
    pipeline = dynamic_pipeline(activation="relu")
    pipeline._origin["dynamic"] = {"budgets": [{"share": 1.0, "tau": [1.0, 1.0]}, {"share": 0.5, "tau": [0.1, 0.1]}]}
    checkpoint = pipeline.to_checkpoint()
    transformer = checkpoint.config.transformer
    trained = compute_router_fingerprint(checkpoint.transformer, transformer)
    dynamic = replace(transformer.dynamic, router_fingerprint=trained)
    checkpoint.config = replace(checkpoint.config, transformer=replace(transformer, dynamic=dynamic))
    write_checkpoint(tmp_path / "dynamic", checkpoint)
    return tmp_path / "dynamic"


def test_bench_reports_what_was_executed(dynamic_folder, capsys, monkeypatch):
    """Fewer FLOPs with pruning, without guidance and with a budget, more with a refiner; GFLOP/s fit the time."""
    monkeypatch.setattr("nextscale.evaluation.latency.measure_peak_memory", lambda *arguments: 2**20)
    config = dynamic_pipeline(activation="relu").config

    def bench(*options):
        assert main(["bench", str(dynamic_folder), "--batch-sizes", "2", "--rounds", "1", *options]) == 0
        (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
        assert case["gflop_per_s"] == pytest.approx(case["gflop_per_image"] * case["images_per_s"])
        return round((case["gflop_per_image"] - case["gflop_decoder"]) * 1e9)

    whole = bench()
    assert whole == sample_flops(config, SampleConfig())
    pruned = bench("--prune", "0.4", "0.5", "--prune-first-block", "1")
    assert pruned == sample_flops(config, SampleConfig(**PRUNE))
    refined = bench("--refiner", str(dynamic_folder), "--draft-scales", "2")
    assert refined > whole, "the refiner takes in the first scales again"
    assert bench("--budget", "0.5", "--cfg", "0") < whole / 2


def test_flops_that_the_config_cannot_know_are_not_stated_as_if_it_did():
    """Structure gives what is the same for all tokens; the table says where it is the most that may run."""
    dense, mixture = tiny_config(), tiny_config(experts=MIXTURE)
    assert count_planned_flops(dense, SampleConfig(**PRUNE)) == sample_flops(dense, SampleConfig(**PRUNE))
    assert count_planned_flops(mixture, SampleConfig()) is None
    assert count_planned_flops(dense, SampleConfig(draft_scales=2), mixture) is None
    assert "at most" in as_text(describe_config("m", mixture))
    assert "with all experts" in as_text(describe_config("m", dynamic_pipeline().config))
    assert "at most" not in as_text(describe_config("m", dense))


def test_experiments_measure_flops_that_depend_on_the_tokens(tmp_path):
    """Of a mixture with zero-computation experts; the figure of a dense model is that of its config."""
    folders = {}
    for name, experts in (("mixture", {"experts": MIXTURE}), ("dense", {})):
        folders[name] = tmp_path / name
        randomised(tiny_config("1,2", **experts)).save_pretrained(folders[name])
    inputs = Inputs("digits", "train", "features", "digits", model=str(folders["mixture"]))
    runner = ExperimentRunner(load_experiment("var-guidance", "tiny"), inputs, tmp_path / "out", World())
    settings = SampleConfig(seed=3)
    pipeline = Pipeline.from_pretrained(folders["mixture"])
    expected = count_sampled_flops(pipeline, [i % 5 for i in range(64)], replace(settings, seed=0))
    figures = runner._count_flops(folders["mixture"], pipeline.config, settings)
    assert figures == {"gflop": expected.flops / 1e9, "flops_share": expected.share}
    assert 0 < expected.share < 1
    assert runner._count_flops(folders["mixture"], pipeline.config, settings) == figures
    assert list((tmp_path / "out").glob("model-*/flops-*.json"))
    config = Pipeline.from_pretrained(folders["dense"]).config
    assert runner._count_flops(folders["dense"], config, settings) == {
        "gflop": sample_flops(config, settings) / 1e9, "flops_share": 1.0,
    }  # fmt: skip
