"""Mamba-2 by itself: chunks, single tokens and carried states are one function, that of transformers' Mamba2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends.cuda.mamba import scan_by_kernel
from nextscale.config.transformer import MambaConfig, TransformerConfig
from nextscale.transformer.mamba import Mamba2, ScanState
from nextscale.transformer.scan import scan, scan_by_token

B, H, P, N_STATE = 2, 3, 4, 5


def arguments(length: int, seed: int, fastest: float = 2.0) -> list[torch.Tensor]:
    """x, dt, A, B, C and a state, at random; decays from none to `fastest` x 8 a token."""
    rng = torch.Generator().manual_seed(seed)
    x, b, c = (torch.randn(B, length, *shape, generator=rng) for shape in ((H, P), (N_STATE,), (N_STATE,)))
    dt = torch.rand(B, length, H, generator=rng) * fastest
    a = -torch.rand(H, generator=rng) * 8
    return [x, dt, a, b, c, torch.randn(B, H, P, N_STATE, generator=rng)]


def close(ours, theirs, tolerance=1e-5):
    """Within the tolerance of the largest value; below 1e-38 float32 has not its precision."""
    worst, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert worst <= tolerance * max(largest, 1e-30), f"largest difference {worst:.2e} of {largest:.2e}"


def in_parts(run, given_, cuts):
    """`run` over stretches of the tokens, each given the state that the one before left."""
    x, dt, a, b, c, state = given_
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = run(x[:, start:end], dt[:, start:end], a, b[:, start:end], c[:, start:end], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), chunk=st.integers(1, 17), cuts=st.sets(st.integers(1, 39), max_size=4),
    seed=st.integers(0, 2**16), fastest=st.sampled_from([1e-3, 0.1, 2.0, 30.0]),
)  # fmt: skip
def test_chunks_single_tokens_and_carried_states_are_one_function(length, chunk, cuts, seed, fastest):
    """Outputs, the last state, and the gradients of all arguments, in float32 against the recurrence in float64."""
    weights = torch.randn(B, length, H, P, generator=torch.Generator().manual_seed(seed))

    def chunked(*given_):
        return scan(*given_, chunk)

    stretches, results = sorted(c for c in cuts if c < length), []
    ways = [(scan_by_token, torch.float64, []), (scan_by_token, torch.float32, stretches)]
    for run, dtype, parts in [*ways, (chunked, torch.float32, []), (chunked, torch.float32, stretches)]:
        given_ = [t.to(dtype).requires_grad_() for t in arguments(length, seed, fastest)]
        y, state = in_parts(run, given_, parts)
        loss = (y * weights).sum() + state.sum()
        results.append([y, state, *torch.autograd.grad(loss, given_)])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            close(ours.detach(), theirs.detach())


def test_what_a_fused_kernel_is_given():
    """A function that does in a plain loop what `mamba_ssm` documents of its kernel, with groups of heads."""

    def documented(x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False):
        state, outputs = initial_states.clone(), []
        for t in range(x.shape[1]):
            for h in range(x.shape[2]):
                group = h // (x.shape[2] // B.shape[2])
                added = dt[:, t, h, None, None] * x[:, t, h, :, None] * B[:, t, group, None, :]
                state[:, h] = state[:, h] * torch.exp(dt[:, t, h] * A[h])[:, None, None] + added
                outputs.append((state[:, h] * C[:, t, group, None, :]).sum(-1))
        y = torch.stack(outputs, dim=1).view_as(x)
        return (y, state) if return_final_states else y

    given_ = arguments(13, 3)
    for ours, theirs in zip(scan_by_kernel(documented, *given_), scan(*given_), strict=True):
        close(ours, theirs)


def mixer(width: int = 16, seed: int = 0, **sizes) -> Mamba2:
    """A mixer with random parameters."""
    mamba = MambaConfig(**{"head_width": 8, "state_width": 6, **sizes})
    config = TransformerConfig(depth=1, width=width, heads=2, mamba=mamba)
    layer, rng = Mamba2(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng))
    return layer


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 30), cuts=st.sets(st.integers(1, 29), max_size=5), seed=st.integers(0, 2**16))
def test_a_carried_state_continues_exactly(length, cuts, seed):
    """Window and sums, over stretches that may be shorter than the convolution; values and gradients."""
    layer, rng = mixer(seed=seed), torch.Generator().manual_seed(seed)
    x, weights = torch.randn(2, length, 16, generator=rng), torch.randn(2, length, 16, generator=rng)
    results = []
    for stretches in ([], sorted(c for c in cuts if c < length)):
        rows, state, outputs = x.clone().requires_grad_(), layer.new_state(2, 0), []
        for start, end in zip([0, *stretches], [*stretches, length], strict=True):
            y, state = layer.continue_from(state, rows[:, start:end])
            outputs.append(y)
        y = torch.cat(outputs, dim=1)
        gradients = torch.autograd.grad((y * weights).sum(), [rows, *layer.parameters()])
        results.append([y, state.window_BkW, state.sums_BHpn, *gradients])
    for ours, theirs in zip(*results, strict=True):
        close(ours.detach(), theirs.detach())


@pytest.mark.parametrize("length", [1, 7, 150])
def test_the_mixer_is_transformers_mamba2(length):
    """Values and gradients, equal parameters; state width, taps, heads and expansion unlike the defaults."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    layer = mixer(24, head_width=12, state_width=10, conv_kernel=3, expand=3)
    settings_ = transformers.Mamba2Config(
        hidden_size=24, state_size=10, conv_kernel=3, expand=3, head_dim=12, num_heads=6, n_groups=1, use_bias=False,
        use_conv_bias=True, layer_norm_epsilon=1e-5, chunk_size=16, num_hidden_layers=1, hidden_act="silu",
    )  # fmt: skip
    theirs = Mamba2Mixer(settings_, layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(2))
    outputs = [layer.continue_from(layer.new_state(2, 0), x)[0], theirs(x)]
    close(outputs[0].detach(), outputs[1].detach())
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *part.parameters()])
        for y, part in zip(outputs, (layer, theirs), strict=True)
    ]
    names = ["x", *(n for n, _ in layer.named_parameters())]
    by_name = dict(zip(["x", *(n for n, _ in theirs.named_parameters())], gradients[1], strict=True))
    for name, gradient in zip(names, gradients[0], strict=True):
        close(gradient, by_name[name], 2e-5)


@torch.no_grad()
def test_what_bfloat16_costs():
    """Projections in bfloat16, the scan in float32: the state stays float32, the output's error is bfloat16's own."""
    layer = mixer(64, state_width=64, head_width=64)
    low, x = mixer(64, state_width=64, head_width=64).to(torch.bfloat16), torch.randn(2, 100, 64)
    exact, _ = layer.continue_from(layer.new_state(2, 0), x)
    y, state = low.continue_from(low.new_state(2, 0), x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.sums_BHpn.dtype == state.window_BkW.dtype == torch.float32
    error = (y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.02, f"rms error {error:.4f} of the output's"


@torch.no_grad()
def test_the_state_is_of_one_size_and_taken_in_place():
    layer = mixer()
    kept = layer.new_state(3, 10**9)
    pointers = [t.data_ptr() for t in (kept.window_BkW, kept.sums_BHpn)]
    _, left = layer.continue_from(kept, torch.randn(3, 50, 16))
    assert left.window_BkW.shape == kept.window_BkW.shape
    assert left.sums_BHpn.shape == kept.sums_BHpn.shape
    kept.copy_from(left)
    assert pointers == [t.data_ptr() for t in (kept.window_BkW, kept.sums_BHpn)]
    assert torch.equal(ScanState.join(kept.split()).sums_BHpn, left.sums_BHpn)


def test_decays_beyond_float32_give_zeros_and_finite_gradients():
    x, dt, a, b, c, state = arguments(130, 0)
    dt = (dt * 1e4).requires_grad_()
    y, left = scan(x, dt, a, b, c, state)
    (y.sum() + left.sum()).backward()
    assert y.isfinite().all()
    assert dt.grad.isfinite().all()
