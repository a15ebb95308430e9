"""The load-balance loss and the load of experts against NumPy written from MEPA's Eq. 10, in float64 and with loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.distributed import World
from nextscale.config.transformer_training import LossConfig
from nextscale.transformer.feed_forward.balance import average_shares, compute_balance_loss, compute_expert_load
from nextscale.transformer.feed_forward.routers import Routing, select_largest
from tests.test_guidance import build_task

pytestmark = pytest.mark.usefixtures("seeded")


def route(scores, chosen):
    return Routing(scores.log(), scores, chosen, torch.where(chosen, scores, 0))


def balance_by_loops(scores, chosen, idle, idle_weight):
    """Eq. 10 for the tokens of all images given, as one sequence."""
    batch, tokens, count = scores.shape
    total = 0.0
    for j in range(count):
        f = sum(chosen[b, i, j].item() for b in range(batch) for i in range(tokens)) / (batch * tokens)
        P = sum(scores[b, i, j].item() for b in range(batch) for i in range(tokens)) / (batch * tokens)
        total += f * P * (idle_weight if j >= count - idle else 1)
    return count * total


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 9), st.integers(0, 4), st.floats(0, 1), st.integers(0, 99))
def test_balance_loss_against_eq_10(batch, tokens, count, idle, idle_weight, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, tokens, count + idle, generator=rng).softmax(-1)
    chosen = torch.rand(scores.shape, generator=rng) < 0.4
    ours = compute_balance_loss(route(scores, chosen), idle, idle_weight)
    by_image = [balance_by_loops(scores[b : b + 1], chosen[b : b + 1], idle, idle_weight) for b in range(batch)]
    assert ours.item() == pytest.approx(np.mean(by_image), rel=1e-5, abs=1e-6)
    # of two layers over the batch, whose N tokens are those of all images
    routings = [route(scores, chosen), route(scores.flip(0), chosen.roll(1, -1))]
    for routing, share_M in zip(routings, average_shares(routings, World()), strict=True):
        ours = compute_balance_loss(routing, idle, idle_weight, share_M)
        expected = balance_by_loops(routing.scores_BNM, routing.selected_BNM, idle, idle_weight)
        assert ours.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_even_use_is_worth_m_and_collapse_costs_more():
    even = torch.eye(8, dtype=torch.bool).roll(1, 0) | torch.eye(8, dtype=torch.bool)  # 2 of 8, in turn
    flat = torch.full((1, 8, 8), 1 / 8)
    assert compute_balance_loss(route(flat, even[None])).item() == pytest.approx(2)
    sure = torch.full((1, 8, 8), 1e-9)
    sure[..., :2] = 0.5
    assert compute_balance_loss(route(sure, sure > 0.1)).item() == pytest.approx(8)


def test_balance_loss_teaches_through_the_scores_alone():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    scores = logits.softmax(-1)
    chosen = select_largest(scores.detach(), 2, -1)
    compute_balance_loss(route(scores, chosen)).backward()
    share = chosen.float().mean(1, keepdim=True)
    s = scores.detach()
    expected = 4 * s * (share - (s * share).sum(-1, keepdim=True)) / (2 * 5)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_images_that_are_even_together_are_not_even_each():
    """Two images that each use half of the experts: over the batch that is even use, for each image it is not."""
    chosen = torch.zeros(2, 3, 4, dtype=torch.bool)
    chosen[0, :, :2], chosen[1, :, 2:] = True, True
    routing = route(torch.where(chosen, 0.5, 1e-9), chosen)
    (share_M,) = average_shares([routing], World())
    assert compute_balance_loss(routing, share_M=share_M).item() == pytest.approx(2)
    assert compute_balance_loss(routing).item() == pytest.approx(4)


@torch.no_grad()
def test_of_one_image_both_are_the_same_and_of_several_not():
    losses = {}
    for over in ("image", "batch"):
        task = build_task("stmoe", LossConfig(balance=1.0, balance_over=over), features=False)
        for count in (1, 3):
            batch = task.examples.fetch(range(count), None)
            losses[over, count] = task(batch, task.draw_noise(count, torch.Generator().manual_seed(0)), 0)[0].item()
    assert losses["image", 1] == pytest.approx(losses["batch", 1], rel=1e-6)
    assert abs(losses["image", 3] - losses["batch", 3]) > 1e-3


@pytest.mark.parametrize(("router", "over"), [("stmoe", "batch"), ("stmoe", "image"), ("none", "batch")])
def test_only_a_balance_over_the_batch_depends_on_the_micro_batch(router, over):
    """Then the processes wait for each other in the forward pass, too."""
    task = build_task(router, LossConfig(balance_over=over), features=False)
    depends = (router, over) == ("stmoe", "batch")
    assert bool(task.micro_batch_matters) == task.waits_in_forward == depends


def test_expert_load_is_normalised():
    chosen = torch.zeros(2, 3, 4, dtype=torch.bool)
    chosen[..., 1], chosen[0, :, 3] = True, True
    assert torch.allclose(compute_expert_load(chosen), torch.tensor([0, 64 * 6 / 9, 0, 64 * 3 / 9]))
    assert torch.allclose(compute_expert_load(chosen, total=1.0), torch.tensor([0, 6 / 9, 0, 3 / 9]))
    assert compute_expert_load(torch.zeros_like(chosen)).abs().sum() == 0
