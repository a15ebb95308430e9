"""FLOPs of what dynamic experts executed: the structural count against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nextscale.backends.cpu import products
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.flops import count_dense_flops, count_sampled_flops, count_step_flops
from nextscale.info import sample_flops
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.test_dynamic import dynamic_pipeline

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Attention as a CPU computes it, which torch's counter leaves out."""


def counting():
    return FlopCounterMode(
        display=False, custom_mapping={FUSED: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}
    )


@pytest.mark.parametrize("selection", ["threshold", "top-k", "random", "pruned"])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_count_equals_torch_s_counter_for_every_scale(monkeypatch, selection, own):
    monkeypatch.setattr(products, "_MIN_ROWS", 1)  # rows of padding are executed too, for independence of the batch
    monkeypatch.setattr(products, "_use_onednn", lambda x, weight: False)  # torch's counter does not know its products
    pipeline = dynamic_pipeline(activation="relu", late_ffn=own).optimize(training=True)
    model, config = pipeline.transformer, pipeline.config
    conditioning, cache = model.embed_condition(torch.tensor([0, 1, 5])), model.new_cache(3)
    seen = []
    for k, count in enumerate(model.pyramid.counts):
        x = torch.randn(3, count, 4) if k else None
        with counting() as counter:
            output = model.step(conditioning, x, k, cache, thresholds=Thresholds((1.0, 1.0, 0.8, 0.5), selection))
        assert counter.get_total_flops() == count_step_flops(config, k, collect(output.records, "activity"), 3)
        seen.append(counter.get_total_flops())
        with counting() as counter:
            model.step(conditioning, x, k, cache)
        assert (seen[-1] < counter.get_total_flops()) == (k >= 2), "only sparse scales save"


def test_sampling_is_counted_from_its_own_records():
    pipeline = dynamic_pipeline(activation="relu")
    config = pipeline.config
    whole = count_sampled_flops(pipeline, [0, 1, 2], SampleConfig(tau=(1.0,)), batch_size=2)
    assert whole.flops == sample_flops(config, SampleConfig()) == count_dense_flops(config, SampleConfig())
    assert whole.share == 1
    less = count_sampled_flops(pipeline, [0, 1, 2], SampleConfig(tau=(0.5,)), batch_size=2)
    again = count_sampled_flops(pipeline, [0, 1, 2], SampleConfig(tau=(0.5,)), batch_size=3)
    assert less.flops == again.flops < whole.flops
    assert less.active_K[:2] == (1.0, 1.0)
    assert max(less.active_K[2:]) < 1
    router = 2 * 25 * 2 * (32 * 8 + 8 * 8)
    idle = sum((1 - active) * n for active, n in zip(less.active_K, config.pyramid.counts, strict=True))
    per_block = 2 * (2 * 2 * 32 * 128) * idle - router  # two sequences, two products, two FLOPs a multiply-add
    assert whole.flops - less.flops == pytest.approx(2 * per_block, rel=1e-6)
