import pytest

from nextscale.checkpoints import build_on_meta
from nextscale.config.presets import PRESETS
from nextscale.info import describe

PUBLISHED = {
    "var-d12": 133_186_960,
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    "var-d36": 2_353_893_904,
    "mvar-d12": 198_435_424,
    "mvar-d16": 464_157_184,
    "mvar-d20": 900_528_736,
    "mvar-d24": 1_550_067_136,
    "mvar-d30": 3_017_065_756,
    "mvar-d32": 3_658_707_968,
}


@pytest.mark.parametrize(("name", "millions"), [("mepa-d12", 252), ("mepa-d16", 585)])
def test_active_parameters_are_the_published_ones_within_a_percent(name, millions):
    """MEPA's Table 2; nextscale counts routers, scale embeddings and the alignment head, which the paper may not."""
    facts = describe(name)
    assert facts["active_parameters"] == pytest.approx(millions * 1e6, rel=0.01)
    assert facts["active_parameters"] < facts["transformer_parameters"] / 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    tokenizer, transformer = build_on_meta(PRESETS[name])
    assert sum(p.numel() for p in transformer.parameters()) == PUBLISHED[name]
    assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355
