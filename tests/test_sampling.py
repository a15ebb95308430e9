"""Sampling: filters against brute force, and the promise about batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.sampling.filters import build_filters, filter_top_k, filter_top_k_top_p, filter_top_p, select_largest
from nextscale.sampling.guidance import guide_logits
from nextscale.sampling.likelihood import compute_log_likelihood
from tests.conftest import randomised, tiny_config

rows = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12)


@given(rows, st.integers(1, 15))
def test_top_k_against_sorting(values, k):
    kept = filter_top_k(torch.tensor(values), k).isfinite().tolist()
    kth = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept == [v >= kth for v in values]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12, unique=True), st.floats(0.01, 1))
def test_top_p_against_a_loop(values, p):
    """Walk up from the least likely: an entry goes while it and all less likely ones have at most 1 - p."""
    kept = filter_top_p(torch.tensor(values), p).isfinite().tolist()
    weights = torch.tensor(values).softmax(0).tolist()
    order = sorted(range(len(values)), key=lambda i: values[i])
    total, gone = 0.0, set()
    for i in order[:-1]:
        total += weights[i]
        if abs(total - (1 - p)) < 1e-5:
            return  # rounding decides
        if total <= 1 - p:
            gone.add(i)
    assert kept == [i not in gone for i in range(len(values))]


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12, unique=True), st.integers(1, 14), st.floats(0.01, 1)
)
def test_both_filters_at_once_are_one_after_the_other(values, k, p):
    logits = torch.tensor([values])
    one_by_one = filter_top_p(filter_top_k(logits, k), p)
    together = filter_top_k_top_p(logits, k, p)
    if not torch.equal(one_by_one, together):  # rounding may decide, where a sum hits 1 - p
        sums = filter_top_k(logits, k).softmax(-1).sort(-1).values.cumsum(-1)
        assert (sums - (1 - p)).abs().min() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 40, 99])
def test_the_largest_values_against_sorting(dtype, k):
    logits = torch.randn(3, 5, 40).to(dtype)
    logits[1] = logits[1].round()  # ties
    assert torch.equal(select_largest(logits, k), logits.sort(dim=-1).values[..., -k:])


def filter_logits(logits, temperature, top_k, top_p):
    """Through the processors of these settings."""
    for process in build_filters(SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p), 1):
        logits = process(logits, 0)
    return logits


def test_filters_off_and_temperature():
    logits = torch.randn(2, 3, 8)
    assert torch.equal(filter_logits(logits, 1.0, 0, 0.0), logits)
    assert torch.equal(filter_logits(logits, 2.0, 0, 0.0), logits / 2)
    assert (filter_logits(logits, 1.0, 1, 0.0).isfinite().sum(-1) == 1).all()


def test_guidance_formula():
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.allclose(guide_logits(a, b, 1.5), a + 1.5 * (a - b), atol=1e-5)
    assert torch.equal(guide_logits(a, b, 0.0), a)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scales", ["1,2,3,4", "1,2,4,8"])
def test_an_image_does_not_depend_on_its_batch(scales, smooth, threads, threads_set):
    """Bit for bit: alone, in any batch size, beside any labels."""
    threads_set(threads)
    pipeline = randomised(tiny_config(scales)).optimize()
    labels = [3, 1, 4, 1, 0, 2, 2] + [1] * 11
    together = pipeline.sample(labels, top_k=8, seed=5, smooth=smooth, batch_size=18)
    for size in (1, 2, 3):
        parts = pipeline.sample(labels, top_k=8, seed=5, smooth=smooth, batch_size=size)
        assert torch.equal(parts.tokens, together.tokens)
        assert torch.equal(parts.tensor, together.tensor)
    alone = pipeline.sample([4], top_k=8, seed=5, smooth=smooth, first_image=2)
    assert torch.equal(alone.tensor[0], together.tensor[2])
    others = pipeline.sample([0, 0, 4, 0], top_k=8, seed=5, smooth=smooth)
    assert torch.equal(others.tensor[2], together.tensor[2])


def test_seeds(tiny):
    a, b, c = (tiny.sample([1, 1], seed=s).tokens for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a[0], a[1]), "two images of one label came out equal"


def test_official_seeding_depends_on_the_batch_and_repeats(tiny):
    a = tiny.sample([1, 2, 3], seed=4, official_seeding=True, batch_size=1).tokens
    assert torch.equal(a, tiny.sample([1, 2, 3], seed=4, official_seeding=True).tokens)


def test_one_scale_is_guided_at_full_strength():
    pipeline = randomised(tiny_config("4"))
    (step,) = pipeline.sample_scales([1], cfg=2.0)
    model = pipeline.transformer
    with torch.no_grad():
        logits = model(torch.tensor([1, 5]), torch.zeros(2, 0, 4)).logits_BNV
    assert torch.allclose(step.logits_BNV[0], guide_logits(logits[0], logits[1], 2.0), atol=1e-5)
    assert pipeline.sample([1, 2], smooth=True).tensor.isfinite().all()


def test_guidance_grows_linearly(tiny):
    """With the same tokens (greedy over one dominant token is not needed: the first scale alone is compared)."""
    plain = next(iter(tiny.sample_scales([1], cfg=0.0)))
    guided = next(iter(tiny.sample_scales([1], cfg=9.0)))
    assert torch.allclose(plain.logits_BNV, guided.logits_BNV, atol=1e-6), "the first scale is not guided"


def test_scales_are_yielded_as_they_are_done(tiny):
    steps = tiny.sample_scales([1, 2], seed=7)
    first = next(steps)
    assert (first.k, first.tokens_BN.shape) == (0, (2, 1))
    rest = list(steps)
    assert [s.k for s in rest] == [1, 2, 3]
    whole = tiny.sample([1, 2], seed=7)
    assert torch.equal(torch.cat([s.tokens_BN for s in (first, *rest)], dim=1), whole.tokens)
    assert torch.equal((tiny.tokenizer.decode_canvas(rest[-1].canvas_BChw) + 1) / 2, whole.tensor)


def test_tokens_paint_the_image(tiny):
    sample = tiny.sample([1, 2, 3])
    assert torch.equal((tiny.tokenizer.decode(sample.tokens) + 1) / 2, sample.tensor)


@torch.no_grad()
def test_log_likelihood_against_the_chain_rule():
    """Token by token through cached steps, as sampling would go."""
    pipeline = randomised(tiny_config("1,2,3"))
    model, tokenizer = pipeline.transformer, pipeline.tokenizer
    tokens, values = torch.randint(0, 32, (2, 14)), torch.tensor([1, 5])
    scores = compute_log_likelihood(tokenizer, model, tokens, values)
    conditioning, cache, canvas = model.embed_condition(values), model.new_cache(2), tokenizer.new_canvas(2)
    for k, (start, end) in enumerate(model.pyramid.spans):
        x = tokenizer.next_input(canvas, k) if k else None
        logp = model.step(conditioning, x, k, cache).logits_BNV.double().log_softmax(-1)
        for b in range(2):
            expected = sum(logp[b, i, tokens[b, start + i]].item() for i in range(end - start))
            assert scores[b, k].item() == pytest.approx(expected, abs=1e-4)
        canvas = tokenizer.add_scale(canvas, tokens[:, start:end], k)


def test_score_api(tiny):
    scores = tiny.score(torch.rand(3, 3, 8, 8), [0, 1, None])
    assert scores.shape == (3, 4)
    assert (scores < 0).all()
    with pytest.raises(UserError, match="one label per image; got 3 images and 1 labels"):
        tiny.score(torch.rand(3, 3, 8, 8), [0])


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    st.floats(0, 4),
    st.integers(0, 40),
    st.floats(0, 1),
)
def test_any_pyramid_and_setting_samples(sides, cfg, top_k, top_p):
    sides = [*sides, (max(h for h, _ in sides), max(w for _, w in sides))]
    pipeline = randomised(tiny_config(",".join(f"{h}x{w}" for h, w in sides)))
    images = pipeline.sample([0, 4], cfg=cfg, top_k=top_k, top_p=top_p)
    assert images.tensor.shape == (2, 3, 2 * sides[-1][0], 2 * sides[-1][1])
    assert 0 <= images.tensor.min() <= images.tensor.max() <= 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cfg": -1.0}, "cfg must be 0 to 1000; got cfg=-1"),
        ({"top_k": -5}, "top_k must be 0"),
        ({"top_p": 1.5}, "top_p must lie in 0"),
        ({"temperature": 0.0}, "temperature must be 0.001"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**setting)


def test_unknown_setting_and_empty_labels(tiny):
    with pytest.raises(UserError, match="no setting 'cgf'; did you mean 'cfg'"):
        tiny.sample([1], cgf=2)
    with pytest.raises(UserError, match="at least one label"):
        tiny.sample([])
