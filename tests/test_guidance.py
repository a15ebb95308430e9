"""Semantic guidance: groups of scales, aggregation and loss against NumPy written from MEPA's Eq. 11 to 13."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig, TransformerConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.data.examples import MemoryExamples
from nextscale.pyramid import PYRAMID_256, Pyramid
from nextscale.training.transformer import TransformerTask
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.routers import Routing
from nextscale.transformer.projector import (
    GROUPS,
    Projector,
    compute_alignment_loss,
    enlarge_scales,
    parse_scale_group,
)
from tests.conftest import randomised, tiny_config
from tests.test_tokenizer import cubic_matrix
from tests.test_transformer import softmax

pytestmark = pytest.mark.usefixtures("seeded")

PYRAMIDS = ["1,2,3,4", "2x1,3x2,4x3", "4", "1,1,2x3,4x5", "1,3,8"]


def test_groups_of_ten_scales_are_table_6_s():
    """Counted from 1 there, from 0 here."""
    assert parse_scale_group("last", 10) == (9,)
    assert parse_scale_group("large", 10) == (7, 8, 9)
    assert parse_scale_group("intermediate", 10) == (4, 5, 6)
    assert parse_scale_group("small", 10) == (0, 1, 2)
    assert parse_scale_group("5, 7,6,7", 10) == (4, 5, 6)


@given(st.integers(1, 40))
def test_groups_of_other_pyramids(count):
    """At least one scale each, in order, small before intermediate before large; where possible apart."""
    found = {name: parse_scale_group(name, count) for name in GROUPS}
    for scales in found.values():
        assert scales == tuple(range(scales[0], scales[-1] + 1))
        assert 0 <= scales[0] <= scales[-1] < count
    assert found["last"] == (count - 1,)
    assert found["large"][-1] == count - 1
    assert found["small"][0] == 0
    assert found["small"] <= found["intermediate"] <= found["large"]
    if count >= 4:
        assert found["small"][-1] < found["intermediate"][0]
        assert found["intermediate"][-1] < found["large"][0]


@pytest.mark.parametrize("group", ["", "middle", "0", "5", "1,5", "1,,2", "-1", "1.5", "3-4", "²"])
def test_groups_that_there_are_not_are_named(group):
    with pytest.raises(UserError, match="loss.group is '.*'; give one of last, large, intermediate, small, or s"):
        parse_scale_group(group, 4)


def resize_map(map_hwE, grid):
    """Bicubic up-sampling by matrices; itself where the side is the same."""
    h, w, _ = map_hwE.shape
    rows = cubic_matrix(h, grid[0]) if h != grid[0] or w != grid[1] else np.eye(h)
    columns = cubic_matrix(w, grid[1]) if h != grid[0] or w != grid[1] else np.eye(w)
    return np.einsum("gh,hwe,vw->gve", rows, map_hwE, columns)


def enlarge_maps(projected_NE, pyramid, grid):
    """Each scale's map on the grid."""
    maps = [projected_NE[start:end].reshape(*side, -1) for side, (start, end) in zip(
        pyramid.sides, pyramid.spans, strict=True) if end <= len(projected_NE)]  # fmt: skip
    return [resize_map(map_hwE, grid) for map_hwE in maps]


def sum_regions(projected_NE, pyramid, grid):
    """z_j of Eq. 11, from the definition: for each j the sum over all i up to j anew."""
    maps = enlarge_maps(projected_NE, pyramid, grid)
    return [sum(maps[: j + 1]) for j in range(len(maps))]


def guidance_by_hand(projected, features, pyramid, scales, aggregate=True):
    """Eq. 12: minus the mean over images and patches of the sum over the group of the cosine."""
    B, g, h, _ = features.shape
    total = 0.0
    for b in range(B):
        z = (sum_regions if aggregate else enlarge_maps)(projected[b], pyramid, (g, h))
        for r in range(g):
            for c in range(h):
                for j in scales:
                    a, t = z[j][r, c], features[b, r, c]
                    total += a @ t / (np.linalg.norm(a) * np.linalg.norm(t))
    return -total / (B * g * h)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(PYRAMIDS).map(Pyramid.parse), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6),
    st.integers(1, 5), st.data(),
)  # fmt: skip
def test_aggregation_and_loss_against_the_formulas(pyramid, batch, g, h, width, data):
    """On any grid, also one smaller than the map; with any group."""
    scales = tuple(sorted(data.draw(st.sets(st.integers(0, len(pyramid) - 1), min_size=1))))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    projected = torch.randn(batch, pyramid.spans[max(scales)][1], width, generator=rng)
    features = torch.randn(batch, g, h, width, generator=rng)
    maps = enlarge_scales(projected, pyramid, (g, h))
    assert len(maps) == max(scales) + 1, "as many as there are features of"
    for b in range(batch):
        largest = projected[b].abs().max().item()
        for ours, theirs in zip(maps, enlarge_maps(projected[b].double().numpy(), pyramid, (g, h)), strict=True):
            atol = 1e-5 * max(np.abs(theirs).max(), 0.1 * largest)
            np.testing.assert_allclose(ours[b].permute(1, 2, 0).numpy(), theirs, atol=atol)
    for aggregate in (True, False):
        loss = compute_alignment_loss(projected, features, pyramid, scales, aggregate)
        expected = guidance_by_hand(projected.double().numpy(), features.double().numpy(), pyramid, scales, aggregate)
        assert loss.item() == pytest.approx(expected, abs=1e-3 if width == 1 else 2e-5)
        assert loss.dtype == torch.float32
        assert abs(loss.item()) <= len(scales) + 1e-5


def test_loss_is_lowest_where_the_features_are_met_at_any_length():
    pyramid, features = Pyramid.parse("1,2"), torch.randn(2, 1, 1, 5).expand(2, 2, 2, 5)
    projected = torch.zeros(2, 5, 5)
    projected[:, :1] = 3 * features[:, 0, :1]
    assert compute_alignment_loss(projected, features, pyramid, (0, 1)).item() == pytest.approx(-2)
    assert compute_alignment_loss(-projected, features, pyramid, (0, 1)).item() == pytest.approx(2)


def test_the_loss_reaches_all_scales_up_to_the_group_s_last_and_no_further():
    projected = torch.randn(2, PYRAMID_256.length, 3, requires_grad=True)
    compute_alignment_loss(projected, torch.randn(2, 16, 16, 3), PYRAMID_256, (4, 5)).backward()
    end = PYRAMID_256.spans[5][1]
    assert (projected.grad[:, :end].abs().amax(dim=(0, 2)) > 0).all()
    assert projected.grad[:, end:].abs().max() == 0
    projected.grad = None  # without aggregation it reaches the scales of the group alone
    compute_alignment_loss(projected, torch.randn(2, 16, 16, 3), PYRAMID_256, (2, 5), aggregate=False).backward()
    reached = [projected.grad[:, start:end].abs().max().item() > 0 for start, end in PYRAMID_256.spans]
    assert [k for k, found in enumerate(reached) if found] == [2, 5]


def test_autocast_and_half_features_are_compared_in_float32():
    pyramid = Pyramid.parse("1,2,3")
    projected, features = torch.randn(2, 14, 8), torch.randn(2, 3, 3, 8).half()
    plain = compute_alignment_loss(projected, features, pyramid, (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compute_alignment_loss(projected, features, pyramid, (1, 2)), plain)


@torch.no_grad()
def test_projector_against_the_formula():
    config = TransformerConfig(depth=1, width=6, heads=1, alignment=AlignmentConfig(width=5, hidden=7))
    module = Projector(config)
    p = {n: t.double().numpy() for n, t in module.state_dict().items()}
    assert {n: t.shape for n, t in p.items() if n.endswith("weight")} == {
        "fc1.weight": (7, 6), "fc2.weight": (7, 7), "fc3.weight": (5, 7),
    }  # fmt: skip
    x = torch.randn(2, 4, 6)
    y = x.double().numpy()
    for layer in ("fc1", "fc2", "fc3"):
        y = y @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        y = y / (1 + np.exp(-y)) if layer != "fc3" else y
    np.testing.assert_allclose(module(x).numpy(), y, atol=1e-5)


# ---- in the transformer


@pytest.mark.parametrize(("depth", "block", "expected"), [(4, 0, 2), (5, 0, 2), (1, 0, 1), (4, 3, 3), (4, 4, 4)])
@torch.no_grad()
def test_the_projector_sees_the_output_of_its_block(depth, block, expected):
    """Of the first scales alone; what follows that block does not matter, what stands before does."""
    config = tiny_config(depth=depth, alignment=AlignmentConfig(width=6, hidden=8, block=block))
    model = randomised(config).transformer
    assert config.transformer.aligned_block == expected
    values, x = torch.tensor([1, 2]), torch.randn(2, 29, 4)
    seen = {}
    handles = [
        b.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i + 1, out[0]))
        for i, b in enumerate(model.blocks)
    ]
    for guided in range(1, 5):
        projected = model(values, x, aligned_scales=guided).projected_BNE
        end = model.pyramid.spans[guided - 1][1]
        assert projected.shape == (2, end, 6)
        assert torch.allclose(projected, model.projector(seen[expected][:, :end]), atol=1e-5)
    for handle in handles:
        handle.remove()
    plain = model(values, x)
    assert plain.projected_BNE is None
    assert torch.equal(plain.logits_BNV, model(values, x, aligned_scales=2).logits_BNV)


def test_a_block_beyond_the_depth_is_named():
    with pytest.raises(UserError, match="alignment.block 3 is beyond the depth, 2"):
        tiny_config(alignment=AlignmentConfig(width=4, block=3))


# ---- in training

EXPERTS = {
    "none": {},
    "stmoe": {},
    "moe++": {"zero": 1, "copy": 2, "constant": 1},
    "shared": {"router": "stmoe", "share_scale_embedding": True},
}
CHOICES = {"": {}, "over the batch, without aggregation": {"balance_over": "batch", "aggregate": False}}
"""What the paper leaves open, or argues against."""


def build_task(router="stmoe", loss=None, features=True, config=None, **transformer):
    """A task on random tokens with features, whose model has an alignment head and perhaps experts."""
    experts = ExpertsConfig(**{"router": router, "count": 4, "active": 2, **EXPERTS.get(router, {})})
    pipeline = randomised(tiny_config(experts=experts, alignment=AlignmentConfig(width=6, hidden=8), **transformer))
    rng = torch.Generator().manual_seed(0)
    parts = {
        "tokens": torch.randint(0, 32, (20, 30), generator=rng),
        "label": torch.randint(0, 5, (20,), generator=rng),
    }
    if features:
        parts["features"] = torch.randn(20, 4, 4, 6, generator=rng).half()
    config = config or TrainConfig(steps=8, batch_size=6, label_drop=0.0, log_every=1)
    return TransformerTask(pipeline.transformer, pipeline.tokenizer, MemoryExamples(**parts), config, loss)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("router", EXPERTS)
@pytest.mark.parametrize("group", ["last", "small", "2,3"])
@torch.no_grad()
def test_the_whole_loss_by_hand(router, group, choice):
    """L_SG + lambda L_CE + w sum of L_b over the blocks (Eq. 10 to 13), each from its own formula."""
    settings_ = LossConfig(
        balance=0.3, idle_balance=0.6, encoder="cache", group=group, cross_entropy=0.7, **CHOICES[choice]
    )
    task = build_task(router, settings_)
    batch = task.examples.fetch(range(3), None)
    noise = task.draw_noise(3, torch.Generator().manual_seed(0))
    loss, scalars = task(batch, noise, 0)
    pyramid, scales = task.model.pyramid, parse_scale_group(group, 4)
    inputs = task.frozen.tokenizer.teacher_inputs(batch["tokens"])
    output = task.model(batch["label"], inputs, aligned_scales=max(scales) + 1)

    likely = softmax(output.logits_BNV.double().numpy())
    tokens = batch["tokens"].numpy()
    entropy = -np.mean([[np.log(likely[b, i, tokens[b, i]]) for i in range(30)] for b in range(3)])
    guidance = guidance_by_hand(
        output.projected_BNE.double().numpy(), batch["features"].double().numpy(), pyramid, scales, not choice
    )
    balances, M = [], 8 if router == "moe++" else 4
    routings = collect(output.records, "routing")
    assert len(routings) == (0 if router == "none" else len(task.model.blocks))
    for routing in routings:
        assert isinstance(routing, Routing)
        per_image, chosen = [], routing.selected_BNM.double().numpy()
        for b in range(3):
            f = chosen.mean((0, 1)) if choice else chosen[b].mean(0)
            P = routing.scores_BNM[b].double().numpy().mean(0)
            per_image.append(M * (f * P * np.where(np.arange(M) < 4, 1, 0.6)).sum())
        balances.append(np.mean(per_image))
    assert scalars["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert scalars["guidance"].item() == pytest.approx(guidance, abs=1e-5)
    assert loss.item() == pytest.approx(guidance + 0.7 * entropy + 0.3 * sum(balances), rel=1e-5)
    if balances:
        assert scalars["balance"].item() == pytest.approx(np.mean(balances), rel=1e-5)
        assert scalars["expert_load"].shape == (M,)
        assert scalars["expert_load"].sum().item() == pytest.approx(64, rel=1e-5)
    else:
        assert {"balance", "expert_load"}.isdisjoint(scalars)
    # what is validated is the plain cross-entropy, without noise, whatever was trained
    validated, _ = task(batch, {}, 0)
    assert validated.item() == pytest.approx(entropy, rel=1e-5)


@torch.no_grad()
def test_without_guidance_the_cross_entropy_counts_once():
    """Lambda belongs to Eq. 13; no encoder, no lambda and no projection, even with a head."""
    task = build_task("none", LossConfig(cross_entropy=0.5), features=False)
    batch = task.examples.fetch(range(3), None)
    loss, scalars = task(batch, task.draw_noise(3, torch.Generator()), 0)
    assert torch.equal(loss, scalars["cross_entropy"])
    assert "guidance" not in scalars


def test_an_unknown_group_stops_before_training():
    with pytest.raises(UserError, match="loss.group is 'early'; give one of"):
        build_task(loss=LossConfig(encoder="cache", group="early"))


@pytest.mark.parametrize("name", ["balance", "idle_balance", "cross_entropy"])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_weights_that_are_none_are_named(name, value):
    with pytest.raises(UserError, match=f"loss: {name} must be 0 or more; got {name}="):
        LossConfig(**{name: value})
