"""Experts within experts: a mixture whose every expert is divided, of which a dial runs a part for each token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextscale.backends.cpu import ops
from nextscale.checkpoints.checkpoint import build_on_meta
from nextscale.config.dynamic import DynamicConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.info import describe_config
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.dynamic import sampled_flops
from nextscale.research.analysis.load import routing_of
from nextscale.sparsify.calibrate import calibrate
from nextscale.sparsify.convert import relufied, split
from nextscale.sparsify.flops import step_flops
from nextscale.sparsify.task import RouterTask, TuneTask, layers
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.balance import balance_loss
from nextscale.transformer.feed_forward.records import Norms, Sparsity, Use, recorded
from nextscale.transformer.feed_forward.routers import ROUTERS, Routing
from nextscale.transformer.feed_forward.thresholds import Dial
from tests.conftest import check_flops, randomised
from tests.test_dynamic_flops import counting
from tests.test_moe_model import moe_config
from tests.test_sparsify import examples

pytestmark = pytest.mark.usefixtures("seeded")
KINDS = ("threshold", "oracle", "top-k", "pruned")
SIZE, PARTS = 16, 8


def nested(router="stmoe", seed=0, **dynamic):
    made = {"experts": PARTS, "scales": 2, "router_width": 8, "activation": "relu", "identity": "trained", **dynamic}
    pipeline = randomised(moe_config(router, dynamic=DynamicConfig(**made)), seed)
    with torch.no_grad():
        for ffn in layers(pipeline.transformer):
            ffn.importance_F.copy_(torch.rand(128))
    return pipeline


def logits(pipeline, dial=None, batch=3):
    inputs = torch.randn(batch, 29, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipeline.transformer(torch.arange(batch), inputs, dial=dial).logits_BNV


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def context_of(pipeline, k, dial):
    pyramid = pipeline.transformer.pyramid
    return ScaleContext(pyramid, pyramid.spans[k], k=k, dial=dial)


# ---- the function


@pytest.mark.parametrize(
    ("router", "tuned"),
    [*((router, "no") for router in ROUTERS), ("stmoe", "all"), ("stmoe", "late"), ("moe++", "late")],
)
def test_with_all_parts_on_it_is_the_mixture_that_was_divided(router, tuned):
    plain = randomised(moe_config(router, count=3, depth=1)).to_checkpoint()
    before = plain if tuned == "no" else relufied(plain, 2, own=tuned == "late")
    after = split(before, SIZE, 2, 8, seed=3)
    untouched = {n: t for n, t in plain.transformer.items() if ".ffn.experts." not in n}
    assert all(torch.equal(after.transformer[name], tensor) for name, tensor in untouched.items())
    stacked, late = plain.transformer["blocks.0.ffn.experts.fc2.weight"], ".late" if tuned == "late" else ""
    for j, whole in enumerate(stacked):
        columns = after.transformer[f"blocks.0.ffn.experts.{j}{late}.fc2.weight"]
        assert sorted(map(tuple, columns.T.tolist())) == sorted(map(tuple, whole.T.tolist()))
    expected, made = logits(Pipeline.from_checkpoint(before)), Pipeline.from_checkpoint(after)
    assert difference(logits(made), expected) <= 1e-5
    assert torch.equal(logits(made, Dial((1.0,) * 4)), logits(made))
    if tuned == "late":
        assert difference(expected[:, :5], logits(Pipeline.from_checkpoint(plain))[:, :5]) <= 1e-5
    else:
        assert (difference(expected, logits(Pipeline.from_checkpoint(plain))) > 1e-3) == (tuned == "all")


def parts_by_hand(ffn, x_D, tau, selection):
    """(output, hidden units that ran) of one expert for one token, by loops in float64."""
    q = {name: p.detach().double().numpy() for name, p in ffn.named_parameters()}
    a_F = np.maximum(q["fc1.weight"] @ x_D + q["fc1.bias"], 0)
    if selection == "pruned":
        kept = np.argsort(-ffn.importance_F.numpy(), kind="stable")[: round(tau * 128)]
        return q["fc2.weight"][:, kept] @ a_F[kept] + q["fc2.bias"], len(kept)
    outs_ED = [q["fc2.weight"][:, i : i + SIZE] @ a_F[i : i + SIZE] for i in range(0, 128, SIZE)]
    if selection == "oracle":
        p_E = np.array([np.linalg.norm(out) for out in outs_ED])
    else:
        hidden = q["router.fc1.weight"] @ x_D
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        p_E = np.abs(q["router.fc2.weight"] @ hidden)
    if selection == "top-k":
        chosen = np.argsort(-p_E, kind="stable")[: round(tau * PARTS)]
    else:
        chosen = np.flatnonzero(p_E >= (1 - tau) * p_E.max())
    return q["fc2.bias"] + sum(outs_ED[e] for e in chosen), SIZE * len(chosen)


@pytest.mark.parametrize("selection", KINDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_dial_runs_of_each_expert_what_loops_over_pairs_say(router, selection):
    pipeline, tau = nested(router), 0.5
    layer, x_BND = pipeline.transformer.blocks[0].ffn, torch.randn(2, 16, 32)
    with torch.no_grad():
        y_BND, routing = layer(x_BND, context_of(pipeline, 3, Dial((1.0, 1.0, 1.0, tau), selection)))
        plain = layer.router(x_BND, context_of(pipeline, 3, None))
        expected = (layer.idle(x_BND, routing.gates_BNM[..., 6:]) if layer.idle else torch.zeros_like(x_BND)).numpy()
    assert torch.equal(routing.chosen_BNM, plain.chosen_BNM), "the mixture routes as ever"
    units, ffns = np.zeros((2, 16), dtype=int), np.zeros((2, 16), dtype=int)
    for b, n, j in routing.chosen_BNM[..., :6].nonzero().tolist():
        out_D, ran = parts_by_hand(layer.experts[j], x_BND[b, n].double().numpy(), tau, selection)
        expected[b, n] += routing.gates_BNM[b, n, j].item() * out_D
        units[b, n] += ran
        ffns[b, n] += 1
    np.testing.assert_allclose(y_BND.numpy(), expected, rtol=1e-4, atol=1e-5)
    activity = routing.within
    assert activity.units_BN.tolist() == units.tolist()
    assert activity.ffns_BN.tolist() == ffns.tolist()
    assert activity.routed_BN.tolist() == (ffns * (selection in ("threshold", "top-k"))).tolist()
    assert (units < 128 * ffns)[ffns > 0].any()


@pytest.mark.parametrize("router", ROUTERS)
def test_steps_and_the_whole_sequence_agree_under_a_dial(router):
    pipeline, dial = nested(router), Dial((1.0, 1.0, 0.7, 0.4))
    model, x = pipeline.transformer, torch.randn(3, 29, 4, generator=torch.Generator().manual_seed(1))
    whole, cache = logits(pipeline, dial), model.new_cache(3)
    with torch.no_grad():
        conditioning = model.conditioning(torch.arange(3))
        for k, (start, end) in enumerate(model.pyramid.spans):
            step = model.step(conditioning, x[:, start - 1 : end - 1] if k else None, k, cache, dial=dial)
            assert difference(step.logits_BNV, whole[:, start:end]) <= 1e-4
            assert routing_of(step.records[1]).within.routed_BN.any() == (k >= 2)


@pytest.mark.parametrize(
    ("router", "kind"), [*((router, "threshold") for router in ROUTERS), *(("stmoe", kind) for kind in KINDS[1:])]
)
def test_an_image_does_not_depend_on_its_batch_and_tau_1_is_the_mixture(router, kind):
    plain = nested(router)
    for pipeline in (plain, Pipeline.from_checkpoint(plain.to_checkpoint()).pack()):
        whole = pipeline.sample([0, 1, 2], tau=(0.6, 0.3), selection=kind)
        alone = pipeline.sample([1], tau=(0.6, 0.3), selection=kind, first_image=1)
        assert torch.equal(whole.tokens[1:2], alone.tokens)
        assert torch.equal(whole.tensor[1:2], alone.tensor)
        full = pipeline.sample([0, 1, 2], tau=(1.0,), selection=kind)
        assert torch.equal(pipeline.sample([0, 1, 2]).tensor, full.tensor)
    assert whole.tensor.isfinite().all()


@pytest.mark.parametrize("router", ["stmoe", "moe++"])
def test_other_precisions_and_token_pruning(router):
    checkpoint = nested(router).to_checkpoint()
    for dtype in ("bfloat16", "float64"):
        assert Pipeline.from_checkpoint(checkpoint, dtype=dtype).sample([1], tau=(0.5,)).tensor.isfinite().all()
    if router == "stmoe":
        assert Pipeline.from_checkpoint(checkpoint).sample([1], tau=(0.5,), prune=(0.4,)).tensor.isfinite().all()


# ---- what is counted


@pytest.mark.parametrize("selection", ["threshold", "pruned"])
@pytest.mark.parametrize(("router", "batch"), [("stmoe", 1), ("smoe", 1), ("expert-choice", 3), ("moe++", 3)])
@torch.no_grad()
def test_count_equals_torch_s_counter_for_every_scale(monkeypatch, router, batch, selection):
    """Scale embeddings are scored once for a batch, and counted for each of its sequences: those take one."""
    monkeypatch.setattr(ops, "_MIN_ROWS", 1)  # rows of padding are executed too, but only here to keep a promise
    monkeypatch.setattr(ops, "_by_onednn", lambda x, weight: False)  # whose products torch's counter does not know
    pipeline = nested(router)
    model, config = pipeline.transformer, pipeline.config
    conditioning, cache = model.conditioning(torch.arange(batch)), model.new_cache(batch)
    for k, count in enumerate(model.pyramid.counts):
        x = torch.randn(batch, count, 4) if k else None
        with counting() as counter:
            output = model.step(conditioning, x, k, cache, dial=Dial((1.0, 1.0, 0.8, 0.5), selection))
        assert counter.get_total_flops() == step_flops(config, k, output.records, batch)


@pytest.mark.parametrize("router", ROUTERS)
def test_sizes_that_info_tells(router):
    """Active parameters are those of as many experts as work on a token, their routers with them."""
    config = moe_config(router, dynamic=DynamicConfig(experts=PARTS, router_width=8))
    facts, (_, model) = describe_config("nested", config), build_on_meta(config)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    away = sum(size for n, size in sizes.items() if any(f".ffn.experts.{j}." in n for j in range(2, 6)))
    assert facts["parameters"] == sum(sizes.values())
    assert facts["active_parameters"] == sum(sizes.values()) - away
    if router != "stmoe":
        return
    check_flops(config)
    late = describe_config("late", replace(config, transformer=replace(
        config.transformer, dynamic=DynamicConfig(experts=PARTS, router_width=8, activation="relu", own=True)
    )))  # fmt: skip
    assert late["active_parameters"] == facts["active_parameters"], "the FFNs of early scales or those of late ones"


def test_sampling_counts_less_at_a_lower_dial():
    pipeline = nested()
    whole, less, again = (
        sampled_flops(pipeline, [0, 1, 2], SampleConfig(tau=(tau,)), batch_size=batch)
        for tau, batch in ((1.0, 2), (0.5, 2), (0.5, 3))
    )
    assert whole.share == 1
    assert whole.active_K == (1.0,) * 4
    assert less.flops == again.flops < whole.flops
    assert max(less.active_K[2:]) < 1


def test_budgets_of_a_mixture_whose_tokens_choose_idle_experts():
    """Shares that nothing has to be turned down for are one line of the table, and each line has its own figures."""
    pipeline = nested("moe++")
    batch = torch.arange(4), torch.randint(32, (4, 30), generator=torch.Generator().manual_seed(0))
    given = pipeline.config, pipeline.tokenizer, pipeline.transformer, [batch]
    table, points, verified = calibrate(*given, (1.0, 0.99, 0.98, 0.7))
    whole = points[0].share(pipeline.config)
    assert whole < 0.98
    assert points[0].active_K == (1.0,) * 4
    assert [row.share for row in table] == pytest.approx([1.0, whole, 0.7], abs=0.03)
    assert [row.share for row in table[1:]] == [point.share(pipeline.config) for point in verified]
    assert table[1].tau == (1.0, 1.0)


# ---- what is learnt


@pytest.mark.parametrize("router", ROUTERS)
def test_what_a_dial_observes_is_of_all_pairs(router):
    pipeline = nested(router)
    layer, x_BND = pipeline.transformer.blocks[0].ffn, torch.randn(2, 9, 32)

    def observed(what):
        with torch.no_grad():
            routing = layer(x_BND, context_of(pipeline, 2, Dial((1.0,) * 4, observe=what)))[1]
        assert recorded([[None, routing]], type(routing.within)) == [routing.within]
        return routing

    sparsity, norms, use = (observed(what) for what in ("sparsity", "norms", "use"))
    assert isinstance(sparsity.within, Sparsity)
    assert isinstance(norms.within, Norms)
    assert isinstance(use.within, Use)
    rows, uses, true = [], np.zeros((6, 128)), []
    for j, b, n in sparsity.chosen_BNM[..., :6].permute(2, 0, 1).nonzero().tolist():
        ffn = layer.experts[j]
        w1, b1, w2 = (t.detach().double().numpy() for t in (ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight))
        rows.append(np.maximum(w1 @ x_BND[b, n].double().numpy() + b1, 0))
        uses[j] += rows[-1] * np.linalg.norm(w2, axis=0)
        true.append([np.linalg.norm(w2[:, i : i + SIZE] @ rows[-1][i : i + SIZE]) for i in range(0, 128, SIZE)])
    a_RF = np.array(rows)
    hoyer_R = a_RF.sum(-1) ** 2 / (a_RF**2).sum(-1)
    assert sparsity.within.hoyer.item() == pytest.approx(hoyer_R.mean(), rel=1e-4)
    assert sparsity.within.zeros.item() == pytest.approx((a_RF == 0).mean(), rel=1e-5)
    np.testing.assert_allclose(use.within.contribution_F.numpy(), uses.flatten(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norms.within.true_BNE[0].numpy(), true, rtol=1e-4, atol=1e-5)
    assert norms.within.predicted_BNE.shape == norms.within.true_BNE.shape == (1, len(rows), PARTS)


@pytest.mark.parametrize("router", ROUTERS)
def test_tuning_goes_on_with_the_mixture_s_own_loss(router):
    plain = randomised(moe_config(router)).to_checkpoint()
    for own in (False, True):
        pipeline = Pipeline.from_checkpoint(relufied(plain, 2, own))
        task = TuneTask(pipeline.transformer, pipeline.tokenizer, examples(), TrainConfig(), hoyer=0.3)
        batch = examples().fetch(range(6), None)
        loss, found = task(batch, {"drop": torch.zeros(6, dtype=torch.bool)}, 0)
        with torch.no_grad():
            output = task.model(batch["label"], pipeline.tokenizer.teacher_inputs(batch["tokens"]))
        routings = [routing_of(records) for records in output.records]
        assert all(isinstance(r, Routing) and r.within is None for r in routings)
        balance = sum(balance_loss(r, 3 * (router == "moe++")).item() for r in routings)
        parts = found["cross_entropy"].item(), 0.3 * found["hoyer"].item(), 0.01 * balance
        assert loss.item() == pytest.approx(sum(parts), rel=1e-5)
        assert found["balance"].item() == pytest.approx(balance / 2, rel=1e-5)
        assert not any(p.requires_grad for p in task.model.projector.parameters()), "guidance has no part in it"
        loss.backward()
        reached = {n for n, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
        if own:
            assert reached
            assert all(".late." in name for name in reached)
        else:
            assert {"head.weight", "blocks.0.ffn.router.score.weight" if router != "smoe" else "head.bias"} <= reached
            assert any(".ffn.experts.0.fc1" in name for name in reached)


def test_routers_learn_the_norms_and_nothing_else_changes():
    pipeline = nested(identity="")
    model = pipeline.transformer
    task = RouterTask(model, pipeline.tokenizer, examples(), TrainConfig())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if ".experts." in n and ".router." in n}
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.02)
    batch, noise, losses = examples().fetch(range(6), None), {"drop": torch.tensor([True, False] * 3)}, []
    for _ in range(30):
        optimizer.zero_grad()
        loss, found = task(batch, noise, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < found["recall"].item() <= 1


@pytest.mark.parametrize("kind", ["tuning", "routers"])
def test_experts_that_no_token_chose_have_gradients_of_0(kind):
    """As those of a plain mixture have: processes could not add up gradients that some of them do not have."""
    pipeline = nested(identity="")
    with torch.no_grad():
        for block in pipeline.transformer.blocks:
            block.ffn.router.score.weight.zero_()  # of equal scores the first two are taken
    given = pipeline.transformer, pipeline.tokenizer, examples(), TrainConfig()
    task = TuneTask(*given, hoyer=0.3) if kind == "tuning" else RouterTask(*given)
    loss, _ = task(examples().fetch(range(6), None), {"drop": torch.zeros(6, dtype=torch.bool)}, 0)
    loss.backward()
    for ffn in pipeline.transformer.blocks[1].ffn.experts:
        assert (ffn.router.fc2.weight if kind == "routers" else ffn.fc1.weight).grad is not None
    used = [(ffn.router if kind == "routers" else ffn).fc2.weight.grad.any().item() for ffn in layers(task.model)]
    assert used == [True, True, False, False, False, False] * 2
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())
