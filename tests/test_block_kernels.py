"""The compiled kernels of attention and adaLN (nextscale/backends/cpu/kernels/blocks.c) against formulas in float64."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends import optimize
from nextscale.backends.cpu.attention import CpuAdaLayerNorm
from nextscale.backends.cpu.kernels import blocks
from nextscale.backends.cpu.kernels.blocks import attend, modulate
from nextscale.config.transformer import ConditionConfig, TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.transformer.var import VAR
from tests.conftest import examples, needs_kernels, threads


def on_threads(count, call):
    with threads(count), torch.no_grad():
        return call()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_by_formula(qkv, keys, values, lengths, normalise):
    """Query by query; `keys` and `values` (B, H, start, d) come before the scale's own."""
    q, k, v = qkv.double().numpy().transpose(2, 0, 3, 1, 4)
    if normalise:
        q, k = (x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), 1e-12) for x in (q, k))
    k, v = (np.concatenate([old.double().numpy(), new], axis=2) for old, new in ((keys, k), (values, v)))
    scores = np.einsum("bhnd,bhmd->bhnm", q, k) * lengths.double().numpy()[:, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhnm,bhmd->bnhd", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(*y.shape[:2], -1), k, v


@needs_kernels("blocks")
@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(1, 100), st.integers(0, 90),
    st.booleans(), st.booleans(), st.sampled_from([0.1, 4.0, 100.0]), st.integers(1, 3), st.integers(0, 99),
    st.sampled_from([7, 48, blocks.AT_ONCE]),
)  # fmt: skip
def test_attention_equals_the_formula(
    batch, heads, d, count, start, kept, normalise, length, thread_count, seed, at_once
):
    """Counts that fill no vector, room in the cache or none, sharp and flat softmaxes, more threads than heads,
    chunks of cached keys, of new ones and of both."""
    qkv, lengths = drawn(batch, count, 3, heads, d, seed=seed), torch.rand(heads) + length
    if not normalise:
        lengths = lengths / d**0.5
    k_cache, v_cache = (drawn(batch, heads, start + (count + 2 if kept else 0), d, seed=seed + i) for i in (1, 2))
    before = k_cache.clone(), v_cache.clone()
    expected, k, v = attention_by_formula(qkv, k_cache[:, :, :start], v_cache[:, :, :start], lengths, normalise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "AT_ONCE", at_once)
        y = on_threads(thread_count, lambda: attend(qkv, (k_cache, v_cache), start, lengths, normalise))
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=3e-6 * (1 + length * (d**0.5 if not normalise else 1)))
    end = start + count if kept else start
    for cache, all_of_it, old in ((k_cache, k, before[0]), (v_cache, v, before[1])):
        np.testing.assert_allclose(cache[:, :, :end].numpy(), all_of_it[:, :, :end], rtol=0, atol=1e-6)
        assert torch.equal(cache[:, :, end:], old[:, :, end:]), "beyond the scale nothing is written"
    if start == 0 and at_once == blocks.AT_ONCE:
        alone = on_threads(1, lambda: attend(qkv, None, 0, lengths, normalise))
        assert torch.equal(alone, y), "without a cache it is the same"


@needs_kernels("blocks")
def test_attention_of_an_image_does_not_depend_on_the_others_nor_on_threads():
    qkv, lengths = drawn(5, 70, 3, 3, 32), torch.tensor([1.0, 4.0, 9.0])
    caches = drawn(5, 3, 60, 32, seed=1), drawn(5, 3, 60, 32, seed=2)
    whole = on_threads(2, lambda: attend(qkv, caches, 60, lengths, True))
    for image in range(5):
        some = slice(image, image + 1 + image % 2)
        own = qkv[some], (caches[0][some].clone(), caches[1][some].clone()), 60, lengths, True
        assert torch.equal(on_threads(1, partial(attend, *own)), whole[some])


@needs_kernels("blocks")
def test_a_vector_without_length_stays_finite():
    qkv = drawn(1, 4, 3, 1, 32)
    qkv[0, 1, :2] = 0
    y = on_threads(1, lambda: attend(qkv, None, 0, torch.ones(1), True))
    expected, _, _ = attention_by_formula(qkv, torch.empty(1, 1, 0, 32), torch.empty(1, 1, 0, 32), torch.ones(1), True)
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-5)


@needs_kernels("blocks")
@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([16, 48, 192]), st.integers(1, 3), st.integers(0, 99))
def test_modulation_equals_the_formula(batch, count, width, thread_count, seed):
    """Scale and shift as parts of what adaLN gives, so with strides; one image alone gives the same bits."""
    x, adaln = 3 * drawn(batch, count, width, seed=seed) + 1, drawn(batch, 3, 2, width, seed=seed + 1)
    scale, shift = (adaln[:, i, 1].unsqueeze(1) for i in (1, 2))
    y = on_threads(thread_count, lambda: modulate(x, scale, shift, 1e-6))
    wide = x.double().numpy()
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    expected = normed * (1 + scale.double().numpy()) + shift.double().numpy()
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=2e-5)
    assert torch.equal(on_threads(1, lambda: modulate(x[-1:], scale[-1:], shift[-1:], 1e-6)), y[-1:])


@needs_kernels("blocks")
@pytest.mark.parametrize(("width", "heads", "qk_norm"), [(64, 2, True), (64, 1, False), (192, 6, True)])
def test_a_model_steps_alike_with_kernels_and_without(width, heads, qk_norm, monkeypatch):
    config = TransformerConfig(
        depth=2, width=width, heads=heads, qk_norm=qk_norm, condition=ConditionConfig(num_classes=4)
    )
    pyramid = Pyramid((1, 2, 3, 5))
    torch.manual_seed(0)
    model = VAR(config, pyramid, 32, 8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs, calls, plain = drawn(3, pyramid.length, 8), [], copy.deepcopy(model)
    monkeypatch.setattr("nextscale.backends.cpu.attention.attend", lambda *a: calls.append(attend(*a)) or calls[-1])

    @torch.no_grad()
    def steps(model):
        conditioning, cache = model.embed_condition(torch.tensor([0, 1, 4])), model.new_cache(3)
        return [
            model.step(conditioning, inputs[:, start:end] if k else None, k, cache).logits_BNV
            for k, (start, end) in enumerate(pyramid.spans)
        ]

    fast = steps(optimize(model))
    assert [y is not None for y in calls] == [True] * 8, "kernels are used"
    for found, expected in zip(fast, steps(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_no_kernel_where_none_can_be_used():
    """Gradients, 16 bits, other devices, heads and widths without a kernel, several scales at once."""
    qkv, ones = drawn(1, 4, 3, 2, 32), torch.ones(2)
    x, shift = drawn(1, 4, 32), drawn(1, 1, 32)
    with torch.no_grad():
        assert attend(drawn(1, 4, 3, 2, 24), None, 0, ones, True) is None
        assert attend(qkv.bfloat16(), None, 0, ones.bfloat16(), True) is None
        assert attend(qkv.to("meta"), None, 0, ones.to("meta"), True) is None
        assert modulate(drawn(1, 4, 18), drawn(1, 1, 18), drawn(1, 1, 18), 1e-6) is None
        assert modulate(drawn(2, 4, 32), shift, shift, 1e-6) is None, "one condition for two images"
    assert attend(qkv.requires_grad_(), None, 0, ones, True) is None
    x.requires_grad_()
    assert modulate(x, shift, shift, 1e-6) is None
    CpuAdaLayerNorm(1e-6)(x, shift, shift).sum().backward()
    assert x.grad is not None
