"""The executor: its fast ways against the loop and brute force, values and all gradients; and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nextscale.backends import optimize
from nextscale.backends.cpu import products
from nextscale.backends.cpu.experts import create_dispatch
from nextscale.backends.experts import DifferentiableExperts, run_grouped
from nextscale.transformer.feed_forward.experts import Dispatch, Experts, gather_rows
from tests.test_packed import needs_onednn

pytestmark = pytest.mark.usefixtures("seeded")

NAMES = ("x", "gates", "w1", "b1", "w2", "b2")


def made(count, width, hidden, seed=0):
    experts, rng = Experts(count, width, hidden), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            spread = parameter[0][0].numel() ** -0.5 if parameter.ndim == 3 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=rng))
    return experts


def leaves(experts, x_TD, gates_TM):
    weights = experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias
    return [x_TD, gates_TM, *weights]


def inputs(rows, count, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=rng), torch.rand(rows, count, generator=rng)


def masks(rows, count, kind, seed=0):
    """Who works on what: at random, all to one, none at all, some experts idle, everything, or m for each row."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, count, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(rows, count, generator=rng) < 0.4
    elif kind == "one":
        mask[:, seed % count] = True
    elif kind == "few":
        mask[:, ::3] = torch.rand(rows, len(range(0, count, 3)), generator=rng) < 0.5
    elif kind == "all":
        mask[:] = True
    elif kind == "top":
        best = torch.rand(rows, count, generator=rng).argsort(dim=1)[:, : max(1, count // 2)]
        mask.scatter_(1, best, True)
    return mask


KINDS = ["random", "one", "none", "few", "all", "top"]


def brute_force(experts, x_TD, gates_TM, mask_TM):
    """sum_j over all experts of mask times gate times E_j(x), each on all rows, in float64; differentiable."""
    x, gates, w1, b1, w2, b2 = (t.double() for t in leaves(experts, x_TD, gates_TM))
    y = torch.zeros_like(x)
    for j in range(experts.count):
        out = F.gelu(x @ w1[j].T + b1[j], approximate="tanh") @ w2[j].T + b2[j]
        y = y + (gates[:, j] * mask_TM[:, j])[:, None] * out
    return y


def gradients(experts, compute, x_TD, gates_TM, dy_TD):
    """The result of `compute` and the gradients of all six, in that order; None where there is none."""
    x_TD, gates_TM = x_TD.clone().requires_grad_(), gates_TM.clone().requires_grad_()
    experts.zero_grad()
    y_TD = compute(x_TD, gates_TM)
    grads = torch.autograd.grad(
        y_TD, leaves(experts, x_TD, gates_TM), dy_TD.to(y_TD.dtype), allow_unused=True, materialize_grads=True
    )
    return [y_TD.detach(), *grads]


def assert_near(ours, theirs, bound, what=""):
    for name, mine, exact in zip(("y", *NAMES), ours, theirs, strict=True):
        assert mine.shape == exact.shape, name
        assert mine.isfinite().all(), f"{what} {name} is not finite"
        error = (mine.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1)
        assert error <= bound, f"{what} {name}: {error:.1e} of the largest"


def padded(mask_TM, more):
    """A Dispatch as on a GPU, where there are always as many pairs as there may be: `more` of them padding."""
    T, M = mask_TM.shape
    pair = mask_TM.T.flatten().logical_not().int().argsort(stable=True)[: min(int(mask_TM.sum()) + more, M * T)]
    return Dispatch(pair % T, pair // T, mask_TM.sum(0).cumsum(0).to(torch.int32))


def fast_twin(experts):
    """The CPU's twin for training and inference, on the same parameters."""
    return optimize(nn.ModuleList([experts]), training=True)[0]


def by_loop(experts, mask_TM):
    dispatch = Dispatch.create(mask_TM, int(mask_TM.sum()))
    return lambda x, gates: experts.run(x, gates[dispatch.row_R, dispatch.expert_R], dispatch)


def by_hand(experts, dispatch):
    """`DifferentiableExperts`, which the CPU's twin takes to train."""

    def compute(x, gates):
        gate_R = gates[dispatch.row_R, dispatch.expert_R]
        return DifferentiableExperts.apply(
            x, gate_R.to(x.dtype), dispatch.row_R, dispatch.list_slices(),
            *(t.to(x.dtype) for t in leaves(experts, x, gates)[2:]),
        )  # fmt: skip

    return compute


def by_groups(experts, dispatch):
    def compute(x, gates):
        gate_R = gates[dispatch.row_R, dispatch.expert_R]
        return run_grouped(x, gate_R, dispatch, *(t.to(x.dtype) for t in leaves(experts, x, gates)[2:]))

    return compute


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from(KINDS), st.sampled_from([4, 8, 20]), st.integers(0, 99),
    st.integers(0, 30),
)  # fmt: skip
def test_every_way_against_brute_force_in_float64(onednn, count, rows, kind, width, seed, padding):
    """The loop, the written-out backward pass and the grouped product; also with padding, as a GPU has it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"trains_by_onednn": onednn, "_PRODUCT_ROWS": 8, "_PRODUCT_VALUES": 0}.items():
            patch.setattr(products, name, value)
        experts, mask = made(count, width, 2 * width, seed), masks(rows, count, kind, seed)
        x, gates = inputs(rows, count, width, seed)
        dy = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        exact = gradients(experts, lambda x, g: brute_force(experts, x, g, mask), x, gates, dy)
        ways = {
            "plain": lambda x, g: experts(x, g, mask, int(mask.sum())),
            "fast": lambda x, g: fast_twin(experts)(x, g, mask, int(mask.sum())),
            "loop": by_loop(experts, mask),
            "differentiated": by_hand(experts, Dispatch.create(mask, int(mask.sum()))),
            "differentiated, padded": by_hand(experts, padded(mask, padding)),
            "grouped": by_groups(experts, Dispatch.create(mask, int(mask.sum()))),
            "grouped, padded": by_groups(experts, padded(mask, padding)),
        }
        for name, way in ways.items():
            if name in ("plain", "loop", "grouped") and not mask.any():
                continue  # nothing to differentiate; and no product of no rows
            assert_near(gradients(experts, way, x, gates, dy), exact, 1e-5, name)
        with torch.no_grad():
            y = fast_twin(experts)(x, gates, mask, int(mask.sum()))
        assert (y.double() - exact[0]).abs().max() <= 1e-5 * exact[0].abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [by_hand, by_groups])
def test_sixteen_bits_stay_near(way, kind):
    """bfloat16 keeps 8 bits: 3 % of the largest value, where float64 computes with the same rounded weights."""
    experts, mask = made(6, 16, 32), masks(50, 6, kind, 3)
    x, gates = inputs(50, 6, 16)
    dy = torch.randn(50, 16).bfloat16().float()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter.bfloat16())
    x = x.bfloat16().float()
    exact = gradients(experts, lambda x, g: brute_force(experts, x, g, mask), x, gates, dy)
    low = gradients(experts, lambda x, g: way(experts, padded(mask, 7))(x.bfloat16(), g), x, gates, dy)
    assert_near(low, exact, 0.03)


def test_autocast_trains_in_sixteen_bits():
    experts, mask = fast_twin(made(6, 16, 32)), masks(200, 6, "top", 3)
    x, gates = inputs(200, 6, 16)
    dy = torch.randn(200, 16)

    def low(x, gates):
        with torch.autocast("cpu", torch.bfloat16):
            return experts(x, gates, mask, int(mask.sum()))

    plain = gradients(experts, lambda x, g: experts(x, g, mask, int(mask.sum())), x, gates, dy)
    rounded = gradients(experts, low, x, gates, dy)
    assert rounded[0].dtype == torch.bfloat16
    assert {g.dtype for g in rounded[1:]} == {torch.float32}
    assert_near(rounded, plain, 0.03)
    assert not torch.equal(rounded[0].float(), plain[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_inference_in_other_precisions(dtype):
    experts, mask = made(6, 16, 32), masks(50, 6, "top", 3)
    x, gates = inputs(50, 6, 16)
    exact = brute_force(experts, x, gates, mask)
    y = experts.to(dtype)(x.to(dtype), gates, mask, int(mask.sum()))
    assert y.dtype == dtype
    bound = {torch.bfloat16: 0.03, torch.float16: 5e-3, torch.float64: 1e-6}[dtype]
    assert (y.double() - exact).abs().max() <= bound * exact.abs().max()


def test_a_step_of_the_loss_agrees_with_finite_differences():
    """The written-out backward pass against nothing but its own forward pass, in float64."""
    experts, mask = made(3, 4, 8).double(), masks(9, 3, "random", 1)
    x, gates = inputs(9, 3, 4)
    dispatch = Dispatch.create(mask, int(mask.sum()))
    arguments = [t.detach().double().requires_grad_() for t in leaves(experts, x, gates)]

    def compute(x, gates, *weights):
        gate_R = gates[dispatch.row_R, dispatch.expert_R]
        return DifferentiableExperts.apply(x, gate_R, dispatch.row_R, dispatch.list_slices(), *weights)

    assert torch.autograd.gradcheck(compute, arguments)


def test_gradients_of_an_expanded_result():
    """What `y.sum().backward()` hands in has no strides."""
    experts, mask = made(4, 8, 16), masks(30, 4, "top")
    x, gates = inputs(30, 4, 8)
    ours = gradients(experts, lambda x, g: fast_twin(experts)(x, g, mask, 60).sum(), x, gates, torch.ones(()))
    exact = gradients(experts, lambda x, g: brute_force(experts, x, g, mask).sum(), x, gates, torch.ones(()))
    assert_near(ours, exact, 1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from(KINDS), st.integers(0, 99))
def test_dispatch_lists_every_pair_once_by_expert_then_row(count, rows, kind, seed):
    mask = masks(rows, count, kind, seed)
    dispatch = Dispatch.create(mask, int(mask.sum()))
    expected = [(j, i) for j in range(count) for i in range(rows) if mask[i, j]]
    assert list(zip(dispatch.expert_R.tolist(), dispatch.row_R.tolist(), strict=True)) == expected
    pieces = dispatch.list_slices()
    assert [(j, expected[i][0], expected[e - 1][0]) for j, i, e in pieces] == [(j, j, j) for j, _, _ in pieces]
    assert sum(e - i for _, i, e in pieces) == len(expected)
    more = padded(mask, 5)
    assert more.list_slices() == pieces, "padding belongs to no piece"
    assert torch.equal(more.row_R[: len(expected)], dispatch.row_R)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    """To the last bit, whatever shares the batch and however its experts are loaded."""
    experts, mask = fast_twin(made(8, 24, 48)), masks(60, 8, "top", 2)
    x, gates = inputs(60, 8, 24)
    together = experts(x, gates, mask, int(mask.sum()))
    for size in (1, 2, 7):
        for start in range(0, 60, size):
            rows = slice(start, start + size)
            part = experts(x[rows], gates[rows], mask[rows], int(mask[rows].sum()))
            assert torch.equal(part, together[rows]), f"rows {start} on, {size} at once"


# ---- memory


def kept(count, rows, active, width=16, hidden=64):
    """Bytes that the graph keeps for the backward pass, the parameters apart."""
    experts = made(count, width, hidden)
    x, gates = inputs(rows, count, width)
    best = torch.rand(rows, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :active]
    mask = torch.zeros(rows, count, dtype=torch.bool).scatter_(1, best, True)
    own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    alive: list = []
    gate_R = gates[mask].clone().requires_grad_()  # the gates themselves are the router's
    dispatch = create_dispatch(mask, rows * active)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        weights = leaves(experts, x, gates)[2:]
        DifferentiableExperts.apply(x.requires_grad_(), gate_R, dispatch.row_R, dispatch.list_slices(), *weights)
    return sum(sizes.values())


def test_what_is_kept_grows_with_pairs_and_not_with_experts():
    rows, active, width, hidden = 512, 3, 16, 64
    pairs = rows * active
    expected = 4 * (rows * width + pairs + 2 * pairs * hidden) + 16 * pairs  # x, gates, both hidden layers, indices
    assert kept(8, rows, active) == kept(64, rows, active) == expected
    assert kept(8, 2 * rows, active) == 2 * expected


def peak(count, rows, active, training):
    """The most bytes that torch's CPU allocator held at once beyond what was there before, from its own profile."""
    width, hidden = 16, 64
    experts = fast_twin(made(count, width, hidden))
    x, gates = inputs(rows, count, width)
    best = torch.rand(rows, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :active]
    mask = torch.zeros(rows, count, dtype=torch.bool).scatter_(1, best, True)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        if training:
            experts(x.requires_grad_(), gates.requires_grad_(), mask, rows * active).sum().backward()
        else:
            with torch.no_grad():
                experts(x, gates, mask, rows * active)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_rows_and_gates_and_their_gradients_equal_a_loop(dtype):
    source, gates = torch.randn(6, 5).to(dtype), torch.rand(6, 4).to(dtype)
    mask = torch.tensor([[1, 0, 1, 0], [0] * 4, [1] * 4, [0, 0, 1, 0], [0] * 4, [1, 0, 0, 1]]).bool()
    dispatch = padded(mask, more=3)
    pairs = list(zip(dispatch.row_R.tolist(), dispatch.expert_R.tolist(), strict=True))
    gradient, gate_gradient = torch.randn(len(pairs), 5).to(dtype), torch.randn(len(pairs)).to(dtype)
    expected, gates_expected = torch.zeros(6, 5, dtype=dtype), torch.zeros(6, 4, dtype=dtype)
    for pair, (row, expert) in enumerate(pairs):
        expected[row] += gradient[pair]
        gates_expected[row, expert] += gate_gradient[pair]
    rows = gather_rows(source.requires_grad_(), dispatch.row_R)
    gate_R = dispatch.gather_gates(gates.requires_grad_())
    torch.autograd.backward([rows, gate_R], [gradient, gate_gradient])
    assert torch.equal(rows, torch.stack([source[row] for row, _ in pairs]))
    assert torch.equal(gate_R, torch.stack([gates[pair] for pair in pairs]))
    assert torch.equal(gates.grad, gates_expected)
    torch.testing.assert_close(source.grad, expected)


@pytest.mark.parametrize("training", [False, True])
def test_peak_memory_does_not_grow_with_experts_times_rows(training):
    """Eight times as many experts: what grows is the (rows, experts) arrays of the router's kind and, in training,
    the weights' own gradients; never rows times experts times a width."""
    rows, active, width, hidden = 1024, 3, 16, 64
    few, many = (peak(count, rows, active, training) for count in (8, 64))
    assert few > 4 * rows * width, "the profile saw the allocations"
    weights = 4 * (64 - 8) * (2 * width * hidden + width + hidden) * training
    masks_and_gates = (64 - 8) * rows * (8 + 8 + 4 + 4 + 1)  # indices, sums, gates, their gradients, the mask
    assert many - few <= weights + masks_and_gates
    assert many - few < 4 * rows * (64 - 8) * width / 2 + weights, "dense execution keeps this much and more"
