"""Types: what is stored in 16 bits and computed in float32, what is always computed in full float32, and the words."""

import pytest
import torch

from nextscale.common.precision import is_computed_in_float32, is_fast
from nextscale.config.transformer import MVAR_MIXERS, DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.pipeline import Pipeline
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import randomised, tiny_config

FAMILIES = {
    "dense": {},
    "shared": {"shared_adaln": True, "qk_norm": False},
    "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "zero-computation": {"experts": ExpertsConfig(router="moe++", count=4, active=2, constant=1)},
    "dynamic": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8)},
    "late": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8, late_ffn=True, activation="relu")},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(head_width=8, state_width=16)},
}
slow_float16 = pytest.mark.skipif(is_fast(torch.float16, "cpu"), reason="this CPU is fast in float16")


@slow_float16
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_of_16_bits_are_computed_in_float32_where_that_is_faster(family, training):
    """As the float32 model with the same, rounded weights: to float32's rounding, not to float16's."""
    before = randomised(tiny_config(**FAMILIES[family]), backend="plain").to_checkpoint()
    for part in (before.tokenizer, before.transformer):
        part.update({name: t.half().float() if t.is_floating_point() else t for name, t in part.items()})
    low, full = (Pipeline.from_checkpoint(before, dtype=d, device="cpu") for d in ("float16", "float32"))
    for pipeline in (low, full):
        pipeline.optimize(training=training)
    for name, parameter in low.transformer.named_parameters():
        large = (
            name.endswith("weight")
            and parameter.ndim > 1
            and not any(w in name for w in ("level_embed", "pos_embed", "embedding", "router", "conv"))
        )
        assert parameter.dtype == (torch.float16 if large else torch.float32), name
    config = before.config.transformer
    taus = Thresholds((1.0, 1.0, 0.6, 0.4)) if config.dynamic.experts else None
    labels, tokens = torch.tensor([0, 3, 5]), torch.randint(0, 32, (3, 30), generator=torch.Generator().manual_seed(1))
    logits = []
    for pipeline in (low, full):
        model, inputs = pipeline.transformer, pipeline.tokenizer.teacher_inputs(tokens)
        conditioning, cache = model.embed_condition(labels), model.new_cache(3)
        steps = [
            model.step(
                conditioning, inputs[:, start - 1 : end - 1] if k else None, k, cache, thresholds=taus
            ).logits_BNV
            for k, (start, end) in enumerate(model.pyramid.spans)
        ]
        logits.append(torch.cat(steps, dim=1))
    assert (logits[0] - logits[1]).abs().max() < 2e-5 * logits[1].abs().max()
    images = [pipeline.tokenizer.decode(tokens) for pipeline in (low, full)]
    assert (images[0] - images[1]).abs().max() < 1e-4
    assert low.sample([0, 1], seed=2).tokens.shape == (2, 30)
    assert is_computed_in_float32(low.transformer.head.weight)
