from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextscale.checkpoints import build_on_meta
from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.presets import PRESETS
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import MVAR_MIXERS, MambaConfig
from nextscale.info import as_text, describe, describe_config, sample_flops
from nextscale.sampling import build_sampler
from tests.conftest import check_flops, tiny_config


def shorten(config, depth):
    """The model with so many blocks of the same width."""
    return replace(config, transformer=replace(config.transformer, depth=depth))


SMALL_MAMBA = {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)}
CONFIGS = [
    tiny_config(),
    tiny_config("1,2x3", shared_adaln=True, ffn_ratio=2.0),
    shorten(ModelConfig(), 1),
    tiny_config("1,2,9", **SMALL_MAMBA),  # more tokens than a chunk of the scan, and not a multiple
    tiny_config("1,2,3", global_blocks=1, **SMALL_MAMBA),
    shorten(PRESETS["mvar-d12"], 2),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_structural_count_equals_torch_s_counter(config):
    check_flops(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_kept_bytes_are_those_of_the_cache(config):
    _, model = build_on_meta(config)
    states = [s for block in model.new_cache(1) for s in block if s is not None]
    size = sum(t.numel() * t.element_size() for s in states for t in vars(s).values())
    assert size == describe_config("", config)["per_scale"][-1]["cache_bytes"]


def test_facts_of_a_preset_and_of_a_folder(tiny_folder):
    facts = describe("var-d16")
    assert facts["parameters"] == 310_283_520
    assert facts["per_scale"][-1]["cache_bytes"] == 2 * 4 * 16 * 1024 * (680 - 256)
    # the official sampler was measured at about 300 GMAC per guided image, its decoder at 394 GFLOP
    assert 2 * facts["transformer_flops"] / 2e9 == pytest.approx(300, rel=0.01)
    assert facts["tokenizer_flops"]["decode"] / 1e9 == pytest.approx(394, rel=0.005)
    assert facts["tokenizer_flops"]["encode"] / 1e9 == pytest.approx(215, rel=0.005)
    assert "310,283,520 parameters" in as_text(facts)
    assert describe(str(tiny_folder))["tokens"] == 30
    with pytest.raises(UserError, match="did you mean 'var-d1"):
        describe("var-d11")


@pytest.mark.parametrize(
    "sampling",
    [
        SampleConfig(cfg=0),
        SampleConfig(cfg=1.5),
        SampleConfig(prune=(0.4, 0.5), prune_first_block=1),
        SampleConfig(cfg=0, draft_scales=2),
    ],
)
@torch.no_grad()
def test_flops_of_a_sample_equal_torch_s_counter(sampling):
    """With pruning and with a refiner, whose first pass computes attention as a square under a mask."""
    config, small = tiny_config(depth=2), tiny_config(depth=1, width=16)
    (tokenizer, model), (_, refiner) = build_on_meta(config), build_on_meta(small)
    rows = 2 if sampling.cfg else 1
    values = torch.zeros(1, dtype=torch.int64, device="meta")
    inputs = [torch.empty(1, n, config.tokenizer.code_width, device="meta") for n in config.pyramid.counts[1:]]
    with FlopCounterMode(display=False) as counter:
        refined = refiner if sampling.draft_scales else None
        sampler = build_sampler(tokenizer, model, values, sampling, refiner=refined)
        for k in range(len(config.pyramid)):
            sampler.predict(inputs[k - 1] if k else None, k)
    ours = sample_flops(config, sampling, small if sampling.draft_scales else None)
    square = 0
    if sampling.draft_scales:
        spans = config.pyramid.spans[: sampling.draft_scales + 1]
        square = spans[-1][1] ** 2 - sum((end - start) * end for start, end in spans)
    assert counter.get_total_flops() == ours + 2 * rows * 2 * small.transformer.width * square
