"""Dynamic experts: an exact division of a dense FFN, of which a threshold below 1 runs a part."""

import math
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends import dynamic as execution
from nextscale.backends import optimize
from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels import experts as kernels
from nextscale.backends.experts import run_grouped
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.checkpoints.upcycle import upcycle
from nextscale.common.errors import UserError
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.dynamic import compute_expert_norms
from nextscale.transformer.feed_forward.experts import Dispatch
from nextscale.transformer.feed_forward.records import Norms, Sparsity, UnitContribution
from nextscale.transformer.feed_forward.selection import select_experts, select_random_experts, select_units
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import examples, randomised, tiny_config

KINDS = ("threshold", "oracle", "top-k", "cumulative")


def dynamic_pipeline(seed=0, depth=2, backend="auto", **settings_):
    made = {"experts": 8, "scales": 2, "router_width": 8, "router_fingerprint": "trained", **settings_}
    return randomised(tiny_config(depth=depth, dynamic=DynamicConfig(**made)), seed, backend)


def inputs(batch=3):
    return torch.arange(batch), torch.randn(batch, 29, 4, generator=torch.Generator().manual_seed(1))


def run(pipeline, thresholds=None, batch=3):
    with torch.no_grad():
        return pipeline.transformer(*inputs(batch), thresholds=thresholds)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make_context(pipeline, k=0, thresholds=None):
    from nextscale.transformer.context import ScaleContext

    pyramid = pipeline.transformer.pyramid
    return ScaleContext(pyramid, pyramid.spans[k], k=k, thresholds=thresholds)


# ---- selection


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999), st.sampled_from(KINDS), st.data())
def test_a_smaller_tau_never_runs_more_experts(rows, experts, seed, kind, data):
    p = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).abs()
    p = p * (torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed + 1)) < 0.7)  # zeros, as of ReLU
    a, b = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    fewer, more = select_experts(p, a, kind), select_experts(p, b, kind)
    assert (fewer <= more).all()
    assert fewer.any(dim=1).all()
    assert select_experts(p, 1.0, kind).all()
    only = select_experts(p, 0.0, kind)
    assert (only.sum(dim=1) == 1).all()
    assert torch.equal(p[only], p.amax(dim=1))
    if kind == "threshold":
        largest = p.double().numpy().max(axis=1, keepdims=True)
        rule = (p.double().numpy() >= (1 - b) * largest * (1 + 1e-6)) & (largest > 0)  # else all are equal
        assert (rule <= more.numpy()).all()


def test_the_published_convention_and_the_share_of_top_k():
    p = torch.tensor([[1.0, 0.5, 0.2, 0.19]])
    assert select_experts(p, 0.8).tolist() == [[True, True, True, False]]  # at least 0.2 of the largest
    assert select_experts(p, 0.5, "top-k").tolist() == [[True, True, False, False]]
    assert select_units(torch.tensor([0.1, 3.0, 2.0, 0.2]), 0.5).tolist() == [1, 2]
    assert select_units(torch.tensor([0.1, 3.0]), 0.0).tolist() == [1]
    with pytest.raises(UserError, match="was not measured for this model.*--stages routers"):
        select_units(torch.zeros(4), 0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999), st.floats(0.01, 0.99))
def test_cumulative_selection_is_that_of_a_loop(rows, experts, seed, tau):
    """The largest norms one by one until they have the share tau of the sum, as the official code's dynk."""
    rng = np.random.default_rng(seed)
    p = (rng.integers(0, 50, (rows, experts)) / 64).astype(np.float32)  # exact sums, zeros and equal norms
    expected = np.zeros((rows, experts), dtype=bool)
    for row, norms in enumerate(p):
        reached = np.float32(0)
        for expert in sorted(range(experts), key=lambda e: (-norms[e], e)):
            if expected[row].any() and reached >= np.float32(tau) * norms.sum():
                break
            expected[row, expert] = True
            reached += norms[expert]
    found = select_experts(torch.from_numpy(p), float(np.float32(tau)), "cumulative")
    assert found.tolist() == expected.tolist()


def test_random_experts_depend_on_seed_block_and_position_alone():
    whole = select_random_experts(3, 1, range(200), 8, 0.4, torch.device("cpu"))
    assert (whole.sum(dim=1) == 3).all()
    assert torch.equal(select_random_experts(3, 1, range(50, 80), 8, 0.4, torch.device("cpu")), whole[50:80])
    for seed, block in ((4, 1), (3, 2)):
        assert not torch.equal(select_random_experts(seed, block, range(200), 8, 0.4, torch.device("cpu")), whole)
    share_E = whole.float().mean(dim=0)
    assert (share_E - 3 / 8).abs().max() < 0.15, "every expert alike"
    assert (select_random_experts(3, 1, range(9), 8, 0.01, torch.device("cpu")).sum(dim=1) == 1).all()


def test_steps_and_the_whole_sequence_take_the_same_random_experts():
    pipeline = dynamic_pipeline(router_fingerprint="")  # needs no trained routers
    model, (values, x) = pipeline.transformer, inputs()
    thresholds = Thresholds((1.0, 1.0, 0.7, 0.4), "random", seed=5)
    whole, cache = run(pipeline, thresholds), model.new_cache(3)
    for record in collect(whole.records, "activity"):
        assert (record.units_BN[:, 14:] == 3 * 16).all()
        assert not record.routed_BN.any()
    with torch.no_grad():
        conditioning = model.embed_condition(values)
        for k, (start, end) in enumerate(model.pyramid.spans):
            step = model.step(conditioning, x[:, start - 1 : end - 1] if k else None, k, cache, thresholds=thresholds)
            assert difference(step.logits_BNV, whole.logits_BNV[:, start:end]) <= 1e-4
    a, b = (pipeline.sample([0, 1], tau=(0.3,), selection="random", seed=seed) for seed in (1, 2))
    assert not torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.tokens, pipeline.sample([0, 1], tau=(0.3,), selection="random", seed=1).tokens)


# ---- execution

WAYS = ("whole weights", "packed", "compiled")


def make_layer(experts, relu=False, seed=0):
    """A dynamic feed-forward of plain PyTorch."""
    activation = "relu" if relu else "gelu"
    return (
        dynamic_pipeline(seed, experts=experts, activation=activation, depth=1, backend="plain")
        .transformer.blocks[0]
        .ffn
    )


@contextmanager
def fast_twin(layer, way):
    """Its twin for a CPU, in one of three ways; the compiled one needs a compiler and AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        missing = build.explain_missing("experts", build.MAX_VECTORS) if way == "compiled" else None
        if missing:
            pytest.skip(missing)
        if way != "compiled":
            patch.setattr(build, "load_kernels", lambda *name: None)
        (twin,) = optimize(torch.nn.ModuleList([deepcopy(layer)]), training=way == "whole weights")
        assert type(twin) is not type(layer)
        yield twin


@settings(deadline=None, max_examples=examples(30))
@given(
    st.integers(1, 70),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.sampled_from(WAYS),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_execution_equals_a_loop_over_tokens_and_experts(rows, experts, relu, way, density, seed):
    rng = torch.Generator().manual_seed(seed)
    layer, x = make_layer(experts, relu, seed), torch.randn(rows, 32, generator=rng)
    selected = torch.rand(rows, experts, generator=rng) < density
    w1, b1, w2, b2 = (
        t.detach().double().numpy() for t in (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    )
    S = 128 // experts
    expected = np.tile(b2, (rows, 1))
    for t in range(rows):
        for e in range(experts):
            if selected[t, e]:
                part = slice(e * S, (e + 1) * S)
                h = w1[part] @ x[t].double().numpy() + b1[part]
                a = (
                    np.maximum(h, 0)
                    if relu
                    else 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                )
                expected[t] += w2[:, part] @ a
    with torch.no_grad():
        reference = layer.run_experts(x, selected, relu)
        with fast_twin(layer, way) as twin:
            found = twin.run_experts(x, selected, relu)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(reference.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("experts", [1, 8])
def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch, way, experts, threads_set):
    """Bit for bit, across the borders of tiles and of blocks of every height, on one thread and two."""
    monkeypatch.setattr(kernels, "TILE_VALUES", 24 * 32)
    monkeypatch.setattr(execution, "_MIN_TILE", 16)
    monkeypatch.setattr(execution, "TILE_VALUES", 16 * 32)
    rng = torch.Generator().manual_seed(0)
    x, selected = torch.randn(75, 32, generator=rng), torch.rand(75, experts, generator=rng) < 0.6
    with torch.no_grad(), fast_twin(make_layer(experts), way) as layer:
        whole = layer.run_experts(x, selected, False)
        for rows in (slice(0, 1), slice(3, 20), slice(40, 75), slice(16, 33), *(slice(0, n) for n in range(2, 15))):
            part = layer.run_experts(x[rows], selected[rows], False)
            assert torch.equal(part, whole[rows]), rows
        threads_set(2)
        assert torch.equal(layer.run_experts(x, selected, False), whole)


def test_the_grouped_product_equals_the_loop():
    """What a GPU runs in 16 bits: torch's grouped product, here on the CPU in bfloat16."""
    rng = torch.Generator().manual_seed(0)
    layer = make_layer(4).to(torch.bfloat16)
    x, chosen = torch.randn(40, 32, generator=rng).bfloat16(), torch.rand(40, 4, generator=rng) < 0.5
    with torch.no_grad():
        dispatch = Dispatch.create(chosen, int(chosen.sum()))
        w1, b1 = (t.unflatten(0, (4, -1)) for t in (layer.fc1.weight, layer.fc1.bias))
        w2 = layer.fc2.weight.unflatten(1, (4, -1)).permute(1, 0, 2)
        for relu in (True, False):
            found = run_grouped(x, None, dispatch, w1, b1, w2, None, relu=relu) + layer.fc2.bias
            assert difference(found.float(), layer.run_experts(x, chosen, relu).float()) < 0.02


# ---- the layer


def test_records_say_who_ran_at_which_scale():
    pipeline = dynamic_pipeline(activation="relu")
    output = run(pipeline, Thresholds((1.0, 1.0, 0.6, 0.0)))
    found = collect(output.records, "activity")
    assert len(found) == len(output.records)
    for record in found:
        assert (record.units_BN[:, :5] == 128).all()
        assert (record.units_BN[:, 14:] == 16).all()
        assert not (record.units_BN % 16).any()
        assert record.routed_BN.tolist() == [[0] * 5 + [1] * 25] * 3
    assert run(pipeline).records == [None, None]


def test_steps_and_the_whole_sequence_agree_under_thresholds():
    pipeline = dynamic_pipeline(activation="relu", late_ffn=True)
    model, (values, x), thresholds = pipeline.transformer, inputs(), Thresholds((1.0, 1.0, 0.7, 0.4))
    whole, cache = run(pipeline, thresholds).logits_BNV, model.new_cache(3)
    with torch.no_grad():
        conditioning = model.embed_condition(values)
        for k, (start, end) in enumerate(model.pyramid.spans):
            step = model.step(conditioning, x[:, start - 1 : end - 1] if k else None, k, cache, thresholds=thresholds)
            assert difference(step.logits_BNV, whole[:, start:end]) <= 1e-4


def test_an_oracle_knows_the_norms_and_pruning_keeps_the_same_units_for_all():
    pipeline = dynamic_pipeline(activation="relu")
    layer = pipeline.transformer.blocks[0].ffn
    with torch.no_grad():
        a = layer.fc1(torch.randn(20, 32)).relu()
        outs = torch.stack([a[:, i : i + 16] @ layer.fc2.weight[:, i : i + 16].T for i in range(0, 128, 16)], dim=1)
        torch.testing.assert_close(
            compute_expert_norms(a, layer.fc2.weight, 8, chunk=7), outs.norm(dim=-1), rtol=1e-4, atol=1e-4
        )
        layer.importance_F.copy_(torch.arange(128).flip(0))
        x = torch.randn(2, 16, 32)
        y, record = layer(x, make_context(pipeline, 3, Thresholds((1.0, 1.0, 1.0, 0.25), "pruned")))
        kept = layer.fc1(x)[..., :32].relu() @ layer.fc2.weight[:, :32].T + layer.fc2.bias
    torch.testing.assert_close(y, kept, rtol=1e-4, atol=1e-4)
    assert (record.activity.units_BN == 32).all()
    assert not record.activity.routed_BN.any()


def test_what_thresholds_record_is_what_the_formulas_say():
    pipeline = dynamic_pipeline(activation="relu")
    layer, x = pipeline.transformer.blocks[0].ffn, torch.randn(2, 9, 32)

    def make_record(what):
        with torch.no_grad():
            record = layer(x, make_context(pipeline, 2, Thresholds((1.0,) * 4, record=what)))[1]
            return getattr(record, what)

    a = np.maximum(x.numpy() @ layer.fc1.weight.detach().numpy().T + layer.fc1.bias.detach().numpy(), 0)
    sparsity, norms, contribution = (make_record(what) for what in ("sparsity", "norms", "contribution"))
    assert isinstance(sparsity, Sparsity)
    assert sparsity.hoyer.item() == pytest.approx((a.sum(-1) ** 2 / (a**2).sum(-1)).mean(), rel=1e-4)
    assert sparsity.zeros.item() == pytest.approx((a == 0).mean())
    assert isinstance(norms, Norms)
    assert (norms.predicted_BNE >= 0).all()
    assert isinstance(contribution, UnitContribution)
    columns = np.linalg.norm(layer.fc2.weight.detach().numpy(), axis=0)
    np.testing.assert_allclose(contribution.contribution_F.numpy(), a.sum((0, 1)) * columns, rtol=1e-4)
    np.testing.assert_allclose(contribution.activation_F.numpy(), a.sum((0, 1)), rtol=1e-4)


def test_pruning_by_activation_is_that_of_a_loop():
    """DMoE-VAR's Pruned-FFN, unit by unit: mean GELU activation at the sparse scales, with its sign; the lowest go."""
    pipeline = dynamic_pipeline(router_fingerprint="")
    layer, pyramid = pipeline.transformer.blocks[0].ffn, pipeline.config.pyramid
    thresholds = Thresholds((1.0,) * len(pyramid), record="contribution")
    context = ScaleContext(pyramid, (0, pyramid.length), True, k=len(pyramid) - 1, thresholds=thresholds)
    x = torch.randn(2, pyramid.length, 32)
    with torch.no_grad():
        found = layer(x, context)[1].contribution
    w1, b1, w2, b2 = (p.detach().double().numpy() for layer_ in (layer.fc1, layer.fc2) for p in layer_.parameters())
    u = x.double().numpy()
    units, late = 128, range(pyramid.spans[-2][0], pyramid.length)
    mean, reach = np.zeros(units), np.zeros(units)
    for j in range(units):
        for image in range(2):
            for token in late:
                h = w1[j] @ u[image, token] + b1[j]
                a = 0.5 * h * (1 + math.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                mean[j] += a / (2 * len(late))
                reach[j] += abs(a) * np.linalg.norm(w2[:, j]) / (2 * len(late))
    np.testing.assert_allclose(found.activation_F.numpy() / (2 * len(late)), mean, rtol=1e-4, atol=1e-5)
    layer.activation_F.copy_(found.activation_F)
    layer.importance_F.copy_(found.contribution_F)
    outputs = {}
    for selection, order in ("pruned-activation", mean), ("pruned", reach):
        kept = sorted(range(units), key=lambda j: -order[j])[:96]
        with torch.no_grad():
            y, record = layer(x[:, -16:], make_context(pipeline, 3, Thresholds((1.0, 1.0, 1.0, 0.75), selection)))
        expected = np.tile(b2, (2, 16, 1))
        for j in kept:
            h = u[:, -16:] @ w1[j] + b1[j]
            a = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            expected += a[..., None] * w2[:, j]
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert (record.activity.units_BN == 96).all()
        outputs[selection] = set(kept)
    assert outputs["pruned"] != outputs["pruned-activation"]


def test_every_token_counts_alike_in_the_penalty():
    """In one pass over all scales, sparse ones and others."""
    pipeline = dynamic_pipeline(activation="relu")
    layer, pyramid = pipeline.transformer.blocks[0].ffn, pipeline.config.pyramid
    context = ScaleContext(
        pyramid,
        (0, pyramid.length),
        True,
        k=len(pyramid) - 1,
        thresholds=Thresholds((1.0,) * len(pyramid), record="sparsity"),
    )
    with torch.no_grad():
        x = torch.randn(2, pyramid.length, 32)
        a = layer.fc1(x).relu()
        _, record = layer(x, context)
    assert record.sparsity.hoyer.item() == pytest.approx((a.sum(-1) ** 2 / a.square().sum(-1)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "random", "pruned", "pruned-activation"])
@pytest.mark.parametrize("own", [False, True])
def test_an_image_does_not_depend_on_its_batch_and_tau_1_is_the_dense_model(kind, own):
    pipeline = dynamic_pipeline(activation="relu", late_ffn=own).optimize()
    whole = pipeline.sample([0, 1, 2], tau=(0.6, 0.3), selection=kind)
    alone = pipeline.sample([1], tau=(0.6, 0.3), selection=kind, first_image=1)
    assert torch.equal(whole.tokens[1:2], alone.tokens)
    assert torch.equal(whole.tensor[1:2], alone.tensor)
    dense, full = pipeline.sample([0, 1, 2]), pipeline.sample([0, 1, 2], tau=(1.0,), selection=kind)
    assert torch.equal(dense.tensor, full.tensor)


def test_settings_that_do_not_fit_are_named():
    pipeline = dynamic_pipeline()
    for tau, complaint in ((0.5,) * 5, "lists 5 scales, the model has 4"), ((), "selection top-k needs a tau"):
        with pytest.raises(UserError, match=complaint):
            pipeline.sample([0], tau=tau, selection="top-k")
    with pytest.raises(UserError, match="only the last 2 of this model have experts"):
        dynamic_pipeline(activation="relu", late_ffn=True).sample([0], tau=(0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="routers are not trained.*oracle"):
        dynamic_pipeline(router_fingerprint="").sample([0], tau=(0.5,))
    with pytest.raises(UserError, match="FFNs are divided into experts; this one's are not"):
        randomised(tiny_config()).sample([0], tau=(0.5,))
    with pytest.raises(UserError, match="fixed shapes"):
        dynamic_pipeline().capture().sample([0], tau=(0.5,))
    with pytest.raises(UserError, match=r"tau must list numbers of 0 to 1; got tau=\(1.5,\)"):
        SampleConfig(tau=(1.5,))
    with pytest.raises(UserError, match="budget and tau cannot be combined"):
        SampleConfig(tau=(0.5,), budget=0.5)
    with pytest.raises(UserError, match="one number for each of the sparse scales"):
        DynamicConfig(experts=4, tau=(0.5,))
    with pytest.raises(UserError, match="128 hidden units cannot be divided into 3 experts"):
        tiny_config(dynamic=DynamicConfig(experts=3))
    with pytest.raises(UserError, match=r"inside a mixture of experts \(smoe\) are not supported, as their quality"):
        tiny_config(experts=ExpertsConfig(router="smoe"), dynamic=DynamicConfig(experts=8))
    with pytest.raises(UserError, match="FFNs are dynamic ones"):
        upcycle(pipeline.to_checkpoint(), ExpertsConfig(router="smoe"))
    assert from_dict(TransformerConfig, to_dict(pipeline.config.transformer)) == pipeline.config.transformer


def test_the_router_fingerprint_notices_training_and_order_but_not_16_bits():
    checkpoint = dynamic_pipeline(router_fingerprint="").to_checkpoint()
    model, weights = checkpoint.config.transformer, checkpoint.transformer
    expected = compute_router_fingerprint(weights, model)
    assert expected == compute_router_fingerprint({n: t.bfloat16() for n, t in weights.items()}, model)
    name = "blocks.1.ffn.fc1.bias"
    assert expected != compute_router_fingerprint({**weights, name: weights[name].flip(0)}, model)
    assert expected != compute_router_fingerprint({**weights, name: weights[name] * 1.01}, model)
