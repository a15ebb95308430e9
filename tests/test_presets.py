import pytest

from nextscale.checkpoints.checkpoint import build_on_meta
from nextscale.presets import PRESETS

PUBLISHED = {
    "var-d12": 133_186_960,
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    "var-d36": 2_353_893_904,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    tokenizer, transformer = build_on_meta(PRESETS[name])
    assert sum(p.numel() for p in transformer.parameters()) == PUBLISHED[name]
    assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355
