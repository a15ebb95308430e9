"""The compiled kernels of training steps, against formulas in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends.cpu.kernels import training
from nextscale.backends.cpu.kernels.training import add_gated, apply_gelu, attend_scales, normalise_and_modulate
from tests.conftest import examples, needs_kernels, threads


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_in_float64(qkv, spans, lengths, normalise):
    """(B, L, H d): each scale to itself and to those before, by torch's operators."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if normalise:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = q @ k.transpose(-1, -2) * lengths[:, None, None]
    for start, end in spans:
        scores[:, :, start:end, end:] = -torch.inf
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def differentiate(call, qkv, lengths, dy):
    """The output, and the gradients of both inputs."""
    qkv, lengths = qkv.clone().requires_grad_(), lengths.clone().requires_grad_()
    y = call(qkv, lengths)
    return [y.detach(), *torch.autograd.grad(y, (qkv, lengths), dy)]


@needs_kernels("training")
@settings(max_examples=examples(40), deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.sampled_from([32, 64]),
    st.lists(st.integers(1, 90), min_size=1, max_size=4), st.booleans(), st.sampled_from([0.1, 4.0, 60.0]),
    st.integers(1, 3), st.integers(0, 99), st.sampled_from([7, 48, training.AT_ONCE]),
)  # fmt: skip
def test_attention_of_all_scales_and_its_gradients(
    batch, heads, d, counts, normalise, length, thread_count, seed, at_once
):
    """Scales that fill no vector, sharp and flat softmaxes, more threads than heads, chunks of keys; images alone."""
    ends = np.cumsum(counts).tolist()
    spans, L = tuple(zip([0, *ends[:-1]], ends, strict=True)), ends[-1]
    qkv, dy = drawn(batch, L, 3, heads, d, seed=seed), drawn(batch, L, heads * d, seed=seed + 1)
    lengths = (drawn(heads, seed=seed).abs() + length) / (1 if normalise else d)
    exact = differentiate(
        lambda x, n: attention_in_float64(x, spans, n, normalise), qkv.double(), lengths.double(), dy.double()
    )
    with pytest.MonkeyPatch.context() as patch, threads(thread_count):
        patch.setattr(training, "AT_ONCE", at_once)
        found = differentiate(lambda x, n: attend_scales(x, spans, n, normalise), qkv, lengths, dy)
        last = differentiate(lambda x, n: attend_scales(x, spans, n, normalise), qkv[-1:], lengths, dy[-1:])
    sizes = [t.abs().max().clamp_min(1) for t in exact]
    sizes[2] = (qkv * exact[1]).abs().sum() / lengths.min()  # of what adds up to the gradient of a length
    for ours, theirs, size in zip(found, exact, sizes, strict=True):
        assert (ours - theirs).abs().max() <= 3e-5 * (1 + length / 10) * size
    for ours, alone in zip(found[:2], last[:2], strict=True):
        assert torch.equal(ours[-1:], alone), "an image depends on the others"


@needs_kernels("training")
def test_gradients_of_attention_that_lie_apart():
    """As that of a sum does. The kernel reads a copy of it, 8 MiB that must not be freed before it has ended."""
    spans, qkv, lengths = ((0, 3), (3, 16)), drawn(1024, 16, 3, 2, 64), torch.ones(2)
    dy = torch.tensor(1.0).expand(1024, 16, 128)
    for apart, together in zip(
        *(differentiate(lambda x, n: attend_scales(x, spans, n, True), qkv, lengths, d) for d in (dy, dy.contiguous())),
        strict=True,
    ):
        assert torch.equal(apart, together)


@needs_kernels("training")
@pytest.mark.parametrize("count", [1, 15, 64, 1000])
def test_gelu_and_its_gradient(count):
    """Large values, too, where exponentials end; a part of a larger tensor, rows that lie apart, other threads."""
    x, dy = (10 * drawn(count, 3, seed=seed) ** 3 for seed in (1, 2))
    exact = x.double().requires_grad_()
    F.gelu(exact, approximate="tanh").backward(dy.double())
    for thread_count, given_x in ((1, x), (3, x.T.contiguous().T)):
        ours = given_x.clone(memory_format=torch.preserve_format).requires_grad_()
        with threads(thread_count):
            y = apply_gelu(ours)
            y.backward(dy)
        assert (y - F.gelu(exact, approximate="tanh")).abs().max() <= 1e-6 * exact.abs().max()
        assert (ours.grad - exact.grad).abs().max() <= 2e-6 * exact.grad.abs().max()


@needs_kernels("training")
def test_other_types_and_heads_take_the_plain_way():
    qkv = drawn(1, 5, 3, 2, 64)
    spans, lengths = ((0, 1), (1, 5)), torch.ones(2)
    assert attend_scales(qkv, spans, lengths, True) is not None
    assert attend_scales(qkv[..., :48], spans, lengths, True) is None
    assert attend_scales(qkv.double(), spans, lengths, True) is None
    assert apply_gelu(qkv.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_scales(qkv, spans, lengths, True) is None
        assert apply_gelu(qkv) is None


def norm_in_float64(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


ROWS = {
    "adaLN": (lambda x, scale, shift: normalise_and_modulate(x, scale, shift, 1e-6), norm_in_float64),
    "residual": (lambda x, gamma, y: add_gated(x, y, gamma), lambda x, gamma, y: x + gamma * y),
}


@needs_kernels("training")
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("count", "thread_count"), [(1, 1), (63, 3), (64, 2), (200, 1)])
def test_adaln_and_residual_and_their_gradients(kind, count, thread_count):
    """Rows that are parts of a larger tensor's, other numbers of threads; an image alone; a gradient that is a view."""
    call, formula = ROWS[kind]
    projected = drawn(3, 3, 64, seed=1)
    inputs = [3 * drawn(3, count, 64) + 1, projected[:, 1:2], projected[:, 2:]]
    if kind == "residual":
        inputs[2] = drawn(3, count, 64, seed=2)
    dy = drawn(3, 64, count, seed=3).transpose(1, 2)

    def run(function, inputs, dy):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact = run(formula, [t.double() for t in inputs], dy.double())
    with threads(thread_count):
        found, alone = run(call, inputs, dy), run(call, [t[2:] for t in inputs], dy[2:])
    for ours, theirs, last in zip(found, exact, alone, strict=True):
        assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()
        assert torch.equal(ours[2:], last), "an image depends on the others"


@needs_kernels("training")
def test_rows_that_fill_no_vector_and_conditions_shared_by_images_take_the_plain_way():
    x, row = drawn(2, 3, 64).requires_grad_(), drawn(2, 1, 64)
    assert normalise_and_modulate(x, row, row, 1e-6) is not None
    assert normalise_and_modulate(x, row[:1], row[:1], 1e-6) is None
    assert normalise_and_modulate(x[..., :62].contiguous(), row[..., :62], row[..., :62], 1e-6) is None
    assert add_gated(x, x[:, :1].contiguous(), row) is None, "y is of another shape"
    with torch.no_grad():
        assert add_gated(x, x, row) is None, "no gradient is needed"
    with torch.autocast("cpu", torch.bfloat16):
        assert add_gated(x, x, row) is None
