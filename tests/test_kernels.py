"""The compiled kernels of whole experts, routers and linear layers, against formulas.

tests/test_dynamic.py has that of slices.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextscale.backends import optimize
from nextscale.backends.cpu.kernels import build, linear
from nextscale.backends.cpu.kernels.experts import (
    SlicePanels,
    add_experts_by_kernel,
    from_panels,
    to_panels,
    vectors_for,
)
from nextscale.transformer.feed_forward.dynamic import ExpertRouter
from nextscale.transformer.feed_forward.experts import Experts
from tests.conftest import examples, needs_kernels, threads


def filled(count, width, hidden, seed=0):
    experts, rng = Experts(count, width, hidden), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)
    return experts


def by_formula(experts, x, gates, chosen):
    """sum_j g_j (W2_j gelu(W1_j x + b1_j) + b2_j), row by row in float64."""
    w1, b1, w2, b2 = (
        t.detach().double().numpy()
        for t in (experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias)
    )
    y = np.zeros(x.shape)
    for t, j in chosen.nonzero().tolist():
        h = w1[j] @ x[t].double().numpy() + b1[j]
        a = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        y[t] += float(gates[t, j]) * (w2[j] @ a + b2[j])
    return y


@needs_kernels("experts")
@settings(max_examples=examples(40), deadline=None)
@given(
    st.integers(0, 130), st.integers(1, 5), st.sampled_from([3, 16, 64, 100]), st.sampled_from([5, 64, 130, 300]),
    st.floats(0, 1), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_whole_experts_equal_the_formula(rows, count, width, hidden, density, thread_count, seed):
    """Empty and overfull ones, widths that fill no panel, more rows than a tile has, more threads than panels."""
    rng = torch.Generator().manual_seed(seed)
    experts = filled(count, width, hidden, seed)
    x, gates = torch.randn(rows, width, generator=rng), torch.rand(rows, count, generator=rng)
    chosen = torch.rand(rows, count, generator=rng) < density
    expected = by_formula(experts, x, gates, chosen)
    experts = optimize(torch.nn.ModuleList([experts]))[0]
    with threads(thread_count):
        found = experts(x, gates, chosen, int(chosen.sum()))
    assert experts.fc1.panels is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


@needs_kernels("experts")
@torch.no_grad()
def test_a_row_does_not_depend_on_rows_or_threads():
    """Bit for bit, across blocks of every height, the borders of tiles and chunks, on one to three threads."""
    rng = torch.Generator().manual_seed(0)
    experts = filled(3, 200, 520)
    experts = optimize(torch.nn.ModuleList([experts]))[0]
    x, gates = torch.randn(150, 200, generator=rng), torch.rand(150, 3, generator=rng)
    chosen = torch.rand(150, 3, generator=rng) < 0.7
    whole = experts(x, gates, chosen, int(chosen.sum()))
    for rows in (slice(40, 150), slice(16, 33), *(slice(7, 7 + n) for n in range(1, 60))):
        with threads(1 + rows.stop % 3):
            part = experts(x[rows], gates[rows], chosen[rows], int(chosen[rows].sum()))
        assert torch.equal(part, whole[rows]), rows


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 4), st.integers(1, 140), st.integers(1, 20), st.sampled_from([2, 4]))
def test_panels_are_the_weights_in_another_order(count, out, width, vectors):
    weight = torch.randn(count, out, width)
    panels = to_panels(weight, vectors)
    assert torch.equal(from_panels(panels, out), weight)
    assert panels[0, 0, width // 2, out // 2 % 8] == weight[0, out // 2 % 8, width // 2]


@needs_kernels("experts")
def test_panels_are_saved_and_moved_as_weights(tmp_path):
    experts, x = filled(2, 8, 24), torch.randn(1, 8)
    before = {name: t.clone() for name, t in experts.state_dict().items()}
    gates = chosen = torch.ones(1, 2)
    experts = optimize(torch.nn.ModuleList([experts]))[0]
    with torch.no_grad():
        experts(x, gates, chosen.bool(), 2)  # packs at the first use, whatever the rows
    assert experts.fc2.weight.numel() == 0
    save_file(experts.state_dict(), tmp_path / "experts.safetensors")
    saved = load_file(tmp_path / "experts.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in before.items())
    experts.to(torch.bfloat16)
    assert torch.equal(experts.fc1.weight, before["fc1.weight"].bfloat16())
    assert experts.fc1.panels is None


@settings(max_examples=examples(40), deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 40), st.sampled_from([3, 32, 130]), st.sampled_from([1, 16, 50]),
    st.floats(0.01, 0.99), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_routers_choose_by_the_formula(rows, experts, width, hidden, tau, thread_count, seed):
    rng = torch.Generator().manual_seed(seed)
    router, x = ExpertRouter(width, hidden, experts), torch.randn(rows, width, generator=rng)
    for parameter in router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    w1, w2 = (layer.weight.double().numpy() for layer in (router.fc1, router.fc2))
    h = x.double().numpy() @ w1.T
    p = np.abs((0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))) @ w2.T)
    largest = p.max(axis=1, keepdims=True)
    router = optimize(torch.nn.ModuleList([router]))[0]
    with threads(thread_count):
        chosen = router.select(x, tau, "threshold")
        assert torch.equal(router.select(x[-1:], tau, "threshold"), chosen[-1:]), "it depends on the rows beside it"
    clear = np.abs(p - (1 - tau) * largest) > 1e-4 * largest + 1e-6  # elsewhere rounding decides
    assert (chosen.numpy() == (p >= (1 - tau) * largest))[clear].all()
    assert chosen.any(dim=1).all()


@needs_kernels("experts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 40, 100), (13, 64, 128), (150, 200, 520)])
@torch.no_grad()
def test_weights_of_16_bits_give_the_bits_of_the_same_weights_in_float32(dtype, rows, width, hidden):
    """Of whole experts and of slices, on one thread and two."""
    rng, count = torch.Generator().manual_seed(rows), 4
    x, gate = torch.randn(rows, width, generator=rng), torch.rand(rows, generator=rng)
    w1 = (torch.randn(count, hidden, width, generator=rng) / width**0.5).to(dtype)
    w2 = (torch.randn(count, width, hidden, generator=rng) / hidden**0.5).to(dtype)
    b1, b2 = torch.randn(count, hidden, generator=rng), torch.randn(count, width, generator=rng)
    pairs = torch.arange(rows), gate, torch.tensor([0, rows // 2, rows // 2, rows], dtype=torch.int32)
    chosen = torch.rand(rows, count, generator=rng) < 0.6
    chosen[:, 1] = False
    whole, slices = [], []
    for kind in (dtype, torch.float32):
        whole.append(torch.zeros(rows, width))
        weights = to_panels(w1.to(kind)), b1, to_panels(w2.to(kind)), b2
        with threads(1 + (kind == dtype)):
            add_experts_by_kernel(build.load_kernels("experts", build.MAX_VECTORS), x, pairs, weights, into=whole[-1])
            panels = SlicePanels(
                w1.to(kind).flatten(0, 1), b1.flatten(), w2.to(kind).transpose(0, 1).flatten(1), b2[0], count
            )
            slices.append(panels.output(build.load_kernels("experts", vectors_for(hidden)), x, chosen, False))
    assert whole[0].abs().sum() > 0
    assert torch.equal(*whole)
    assert torch.equal(*slices)


@needs_kernels("linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=examples(40), deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 30, 224, 225, 300]), depth=st.sampled_from([1, 3, 8, 100, 128, 300]),
    outputs=st.sampled_from([1, 5, 16, 64, 150]), gelu=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_linear_layers_of_16_bits_equal_the_formula(dtype, rows, depth, outputs, gelu, biased, seed):
    """Weights that lie apart, and a row that is the same alone."""
    rng = torch.Generator().manual_seed(seed)
    x, whole = torch.randn(rows, depth, generator=rng), torch.randn(outputs, 2 * depth, generator=rng).to(dtype)
    weight, bias = whole.chunk(2, dim=1)[1], torch.randn(outputs, generator=rng) if biased else None
    kernels = build.load_kernels("linear", build.MAX_VECTORS)
    with threads(1 + seed % 3):
        found = linear.run(kernels, x, weight, bias, gelu)
        assert torch.equal(linear.run(kernels, x[-1:], weight, bias, gelu), found[-1:])
    h = x.double().numpy() @ weight.double().numpy().T + (0 if bias is None else bias.numpy())
    expected = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) if gelu else h
    largest = max(1, np.abs(h).max(initial=0))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 * depth**0.5 * largest)
