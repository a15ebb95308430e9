"""Routers against NumPy written from the papers' formulas, in float64 and with loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.common.registry import ROUTERS
from nextscale.config.transformer import ExpertsConfig, TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.feed_forward.mixture import MixtureOfExperts, ZeroComputationExperts
from nextscale.transformer.feed_forward.routers import Routing, select_largest
from tests.test_transformer import softmax

pytestmark = pytest.mark.usefixtures("seeded")

D = 8
PYRAMID = Pyramid.parse("1,2x3,3,4x5")
FULL = ExpertsConfig("moe++", count=3, active=2, renormalise=True, capacity_factor=0.6, exclude_zero=True)
"""Experts that drop tokens."""
PYRAMIDS = st.sampled_from(["1,2,3", "4", "1", "2x1,3x2,3x5", "1,1,2,4", "1,2x3,3,4x5"]).map(Pyramid.parse)


def first_largest(scores, count):
    """Indices of the `count` largest of a list; of equal ones the first: one pass for each, as one would by hand."""
    left, found = list(range(len(scores))), []
    for _ in range(count):
        best = left[0]
        for i in left[1:]:
            if scores[i] > scores[best]:
                best = i
        found.append(best)
        left.remove(best)
    return found


def whole(pyramid):
    """The context of a pass over all scales."""
    return ScaleContext(pyramid, (0, pyramid.length), True, k=len(pyramid) - 1)


def made(config, pyramid, block=1, seed=0):
    """A router with random weights, large enough for scores to differ."""
    rng = torch.Generator().manual_seed(seed)
    router = ROUTERS.get(config.router)(
        TransformerConfig(depth=2, width=D, heads=2, experts=config), len(pyramid), block
    )
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return router


def reference(router, x_BND, pyramid, previous_BNM=None):
    """Scores, mask and gates of a whole sequence in float64, from Eq. 7 to 9 and the rivals' papers."""
    config, W = router.config, router.score.weight.detach().double().numpy().T
    x = x_BND.double().numpy()
    SE = router.scale_embed.weight.detach().double().numpy() if router.scale_embed is not None else None
    residual = getattr(router, "residual", None)
    B, N, _ = x.shape
    logits = np.zeros((B, N, W.shape[1]))
    for b in range(B):
        for i, k in enumerate(pyramid.scale_of_L):
            if config.router == "smoe":
                logits[b, i] = SE[k] @ W
            elif config.router == "stmoe" and config.scale_embedding:
                logits[b, i] = (SE[k] + x[b, i]) @ W
            else:
                logits[b, i] = x[b, i] @ W
            if previous_BNM is not None and residual is not None:
                logits[b, i] += residual.weight.detach().double().numpy() @ previous_BNM[b, i].detach().double().numpy()
    return logits, softmax(logits)


def chosen_by_loops(config, scores, pyramid):
    """Who works on what, given the scores: Eq. 7's top m of each token, or each expert's top tokens per scale."""
    chosen = np.zeros(scores.shape, dtype=bool)
    for b in range(len(scores)):
        if config.router == "expert-choice":
            for start, end in pyramid.spans:
                capacity = max(1, math.ceil((end - start) * config.active / config.count))
                for j in range(config.count):
                    for i in first_largest(scores[b, start:end, j], capacity):
                        chosen[b, start + i, j] = True
        else:
            for i in range(scores.shape[1]):
                chosen[b, i, first_largest(scores[b, i], config.active)] = True
    return chosen


def admitted_by_loops(config, chosen, pyramid):
    """What is left when each expert serves tokens of an image and scale in turn until it is full (Eq. 8)."""
    if config.router != "moe++" or not config.capacity_factor:
        return chosen
    tau, idle = config.capacity_ratio, config.zero + config.copy + config.constant
    left = np.zeros_like(chosen)
    for b in range(len(chosen)):
        for start, end in pyramid.spans:
            share = (end - start) * config.active / (tau * config.count + idle)
            for j in range(chosen.shape[2]):
                places = max(1, math.ceil((tau if j < config.count else 1) * (config.capacity_factor * share)))
                for i in range(start, end):
                    if chosen[b, i, j] and places:
                        left[b, i, j], places = True, places - 1
    return left


def gates_by_loops(config, scores, chosen, admitted):
    """Eq. 7, or divided by the sum of a token's gates; each token and expert by itself."""
    gates = np.zeros(scores.shape)
    for b, i in np.ndindex(*scores.shape[:2]):
        own = [scores[b, i, j] if chosen[b, i, j] else 0.0 for j in range(scores.shape[2])]
        if config.renormalise and config.router == "moe++" and config.exclude_zero:
            own[config.count : config.count + config.zero] = [0.0] * config.zero
        total = sum(own) if config.renormalise and sum(own) else 1
        gates[b, i] = [gate / total if kept else 0 for gate, kept in zip(own, admitted[b, i], strict=True)]
    return gates


def check(router, x_BND, pyramid, previous=None):
    routing = router(x_BND, whole(pyramid), previous and Record(routing=previous))
    logits, scores = reference(router, x_BND, pyramid, previous.logits_BNM if previous else None)
    np.testing.assert_allclose(routing.logits_BNM.detach().numpy(), logits, atol=2e-5 * max(1, np.abs(logits).max()))
    np.testing.assert_allclose(routing.scores_BNM.detach().numpy(), scores, atol=2e-5)
    ours = routing.scores_BNM.detach().numpy()
    chosen = chosen_by_loops(router.config, ours, pyramid)
    admitted = admitted_by_loops(router.config, chosen, pyramid)
    np.testing.assert_array_equal(routing.selected_BNM.numpy(), admitted)
    if routing.requested_BNM is None:
        assert (chosen == admitted).all()
    else:
        np.testing.assert_array_equal(routing.requested_BNM.numpy(), chosen)
    gates = gates_by_loops(router.config, ours, chosen, admitted)
    np.testing.assert_allclose(routing.gates_BNM.detach().numpy(), gates, atol=1e-6)
    assert routing.selected_BNM.dtype == torch.bool
    assert {t.dtype for t in (routing.logits_BNM, routing.scores_BNM, routing.gates_BNM)} == {torch.float32}
    return routing


@st.composite
def experts(draw):
    router = draw(st.sampled_from(sorted(ROUTERS.names)))
    count = draw(st.integers(1, 9))
    idle = {n: draw(st.integers(0, 2)) for n in ("zero", "copy", "constant")}
    most = count + (sum(idle.values()) if router == "moe++" else 0)
    return ExpertsConfig(
        router=router, count=count, active=draw(st.integers(1, most)), renormalise=draw(st.booleans()),
        scale_embedding=draw(st.booleans()), gating_residual=draw(st.booleans()), exclude_zero=draw(st.booleans()),
        capacity_factor=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.1, 3.0])),
        capacity_ratio=draw(st.sampled_from([0.25, 0.75, 1.0])), **idle,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(experts(), PYRAMIDS, st.integers(1, 3), st.integers(0, 1), st.integers(0, 1000))
def test_routers_against_the_formulas(config, pyramid, batch, block, seed):
    router = made(config, pyramid, block, seed)
    x_BND = torch.randn(batch, pyramid.length, D, generator=torch.Generator().manual_seed(seed))
    assert (getattr(router, "residual", None) is not None) == (
        config.router == "moe++" and config.gating_residual and block > 0
    )
    routing = check(router, x_BND, pyramid)
    check(router, x_BND.flip(0, 1), pyramid, previous=routing)
    of_experts = routing.selected_BNM[..., : config.count]
    pairs = router.count_pairs((batch, pyramid.length), whole(pyramid))
    assert of_experts.sum() <= pairs
    if config.router != "moe++":
        assert of_experts.sum() == pairs, "the executor is told exactly how many pairs there are"


@settings(deadline=None, max_examples=40)
@given(experts(), PYRAMIDS, st.integers(0, 1000), st.integers(1, 3))
def test_ties_go_to_the_first(config, pyramid, seed, levels):
    """Scores of few different values, or of one: experts that are equal copies, tokens that are equal."""
    router, rng = made(config, pyramid, 0, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.score.weight.copy_(torch.randint(0, levels, router.score.weight.shape, generator=rng) / 4)
        if router.scale_embed is not None:
            router.scale_embed.weight.copy_(torch.randint(0, levels, router.scale_embed.weight.shape, generator=rng))
    check(router, torch.randint(0, levels, (2, pyramid.length, D), generator=rng).float(), pyramid)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.integers(1, 40))
def test_largest_against_a_walk(values, count):
    count = min(count, len(values))
    found = select_largest(torch.tensor(values), count, dim=0)
    assert found.nonzero().flatten().tolist() == sorted(first_largest(values, count))


def test_all_tokens_may_go_to_one_expert():
    """No capacity, no drop: with one overwhelming score every token takes that expert."""
    config = ExpertsConfig(router="stmoe", count=6, active=1, scale_embedding=False)
    router = made(config, PYRAMID)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[4] = 50
    routing = router(torch.rand(2, PYRAMID.length, D), whole(PYRAMID))
    assert routing.selected_BNM[..., 4].all()
    assert routing.selected_BNM.sum() == 2 * PYRAMID.length
    assert torch.allclose(routing.gates_BNM[..., 4], torch.ones(()), atol=1e-4)


def test_a_scale_of_one_token_has_all_experts_under_expert_choice():
    router = made(ExpertsConfig(router="expert-choice", count=8, active=3), PYRAMID)
    routing = router(torch.randn(3, PYRAMID.length, D), whole(PYRAMID))
    assert routing.selected_BNM[:, 0].all()
    assert torch.allclose(routing.gates_BNM[:, 0].sum(-1), torch.ones(3))
    for start, end in PYRAMID.spans:
        taken = routing.selected_BNM[:, start:end].sum(dim=1)
        assert (taken == math.ceil((end - start) * 3 / 8)).all(), "every expert takes equally many"


def test_smoe_gives_all_tokens_of_a_scale_the_same_experts():
    router = made(ExpertsConfig(router="smoe"), PYRAMID)
    chosen = router(torch.randn(2, PYRAMID.length, D), whole(PYRAMID)).selected_BNM
    sets = set()
    for start, end in PYRAMID.spans:
        assert (chosen[:, start:end] == chosen[:1, start : start + 1]).all()
        sets.add(tuple(chosen[0, start].tolist()))
    assert len(sets) > 1, "random embeddings of scales differ"


@pytest.mark.parametrize("config", [*map(ExpertsConfig, ROUTERS.names), FULL], ids=[*ROUTERS.names, "capacity"])
@torch.no_grad()
def test_a_scale_alone_is_routed_as_within_the_sequence(config):
    """The contexts of `step` and of `prefill` know their scales."""
    made_router, x_BND = made(config, PYRAMID), torch.randn(2, PYRAMID.length, D)
    first = made(config, PYRAMID, block=0, seed=1)(x_BND, whole(PYRAMID))
    together = made_router(x_BND, whole(PYRAMID), Record(routing=first))

    def part(routing, start, end):
        tensors = (getattr(routing, f) for f in Routing.__dataclass_fields__)
        return Routing(*(t if t is None else t[:, start:end] for t in tensors))

    for k, (start, end) in enumerate(PYRAMID.spans):
        step = ScaleContext(PYRAMID, (start, end), k=k)
        prefilled = ScaleContext(PYRAMID, (0, end), True, k=k)
        for begin, context in ((start, step), (0, prefilled)):
            alone = made_router(x_BND[:, begin:end], context, Record(routing=part(first, begin, end)))
            expected = part(together, begin, end)
            assert torch.equal(alone.selected_BNM, expected.selected_BNM)
            assert torch.allclose(alone.gates_BNM, expected.gates_BNM, atol=1e-6)
            assert alone.gates_BNM.shape == (2, end - begin, config.count + config.zero_computation)


@pytest.mark.parametrize("router", ROUTERS.names)
def test_gates_hand_gradients_to_the_router(router):
    """Through the gates alone, as Eq. 6 has it, and not through the choice; written out for the softmax in float64."""
    config = ExpertsConfig(router=router)
    module, x_BND = made(config, PYRAMID), torch.randn(2, PYRAMID.length, D)
    weight_BNM = torch.randn(2, PYRAMID.length, config.count + config.zero_computation)
    routing = module(x_BND, whole(PYRAMID))
    (routing.gates_BNM * weight_BNM).sum().backward()
    S = routing.scores_BNM.detach().double()
    dS = torch.where(routing.selected_BNM, weight_BNM.double(), 0)
    dlogits = S * (dS - (dS * S).sum(-1, keepdim=True))
    seen = torch.zeros_like(x_BND) if router == "smoe" else x_BND
    if module.scale_embed is not None:
        seen = seen + module.scale_embed.weight.detach()[list(PYRAMID.scale_of_L)]
    expected = torch.einsum("bnm,bnd->md", dlogits, seen.double())
    assert torch.allclose(module.score.weight.grad.double(), expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("router", ROUTERS.names)
def test_scores_are_computed_in_float32_whatever_surrounds_them(router):
    """Under autocast, and in a model of 16 bits: rounding would choose other experts."""
    module, x_BND = made(ExpertsConfig(router=router), PYRAMID), torch.randn(2, PYRAMID.length, D)
    plain = module(x_BND, whole(PYRAMID))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x_BND, whole(PYRAMID)).scores_BNM, plain.scores_BNM)
    low = module.bfloat16()(x_BND.bfloat16(), whole(PYRAMID))
    _, scores = reference(module.float(), x_BND.bfloat16().float(), PYRAMID)
    np.testing.assert_allclose(low.scores_BNM.detach().numpy(), scores, atol=2e-5)


# ---- idle experts


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(1, 7), st.integers(0, 100))
def test_idle_experts_against_their_formulas(zero, copy, constant, count, seed):
    """zero: 0; copy: x; constant: a x + b v, (a, b) = softmax(W x) (MoE++, Eq. 3 to 5); each times its gate."""
    if zero + copy + constant == 0:
        return
    rng = torch.Generator().manual_seed(seed)
    module = ZeroComputationExperts(ExpertsConfig(router="moe++", zero=zero, copy=copy, constant=constant), D)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.randn(2, count, D, generator=rng)
    gates = torch.rand(2, count, zero + copy + constant, generator=rng)
    y = module(x, gates).detach()
    expected = np.zeros((2, count, D))
    for b in range(2):
        for i in range(count):
            token = x[b, i].double().numpy()
            for j in range(copy):
                expected[b, i] += gates[b, i, zero + j].item() * token
            for j in range(constant):
                U = module.mix.weight[2 * j : 2 * j + 2].detach().double().numpy()
                a, share = softmax(U @ token)
                v = module.constant[j].detach().double().numpy()
                expected[b, i] += gates[b, i, zero + copy + j].item() * (a * token + share * v)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_a_mixture_adds_its_idle_experts_and_counts_them_last():
    config = TransformerConfig(depth=1, width=D, heads=2, experts=ExpertsConfig(router="moe++", count=3, active=2))
    moe = MixtureOfExperts(config, len(PYRAMID), 0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        x = torch.randn(2, PYRAMID.length, D)
        y, record = moe(x, whole(PYRAMID), None)
        routing = record.routing
        M = config.experts.count
        expected = moe.idle(x, routing.gates_BNM[..., M:])
        for j in range(M):
            h = torch.nn.functional.gelu(x @ moe.experts.fc1.weight[j].T + moe.experts.fc1.bias[j], approximate="tanh")
            out = h @ moe.experts.fc2.weight[j].T + moe.experts.fc2.bias[j]
            expected = expected + routing.gates_BNM[..., j : j + 1] * out
    assert routing.selected_BNM[..., M:].any()
    assert torch.allclose(y, expected, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"router": "stmoe", "count": 4, "active": 5}, "active must be 1 to the number of experts"),
        ({"router": "stmoe", "active": 0}, "active must be 1 to the number of experts; got active=0"),
        ({"router": "stmoe", "count": 0, "active": 1}, "count must be 1 to 4096"),
        ({"router": "moe++", "copy": -1}, "zero, copy and constant must be 0 to 4096"),
        ({"router": "moe++", "capacity_factor": -0.5}, "capacity_factor must be 0 to 4096"),
        ({"router": "moe++", "capacity_ratio": 0.0}, "capacity_ratio must be above 0, up to 1"),
    ],
)
def test_impossible_mixtures_are_named(settings_, message):
    with pytest.raises(UserError, match=message):
        ExpertsConfig(**settings_)
