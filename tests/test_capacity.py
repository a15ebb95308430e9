"""MoE++'s capacity, and its renormalisation without zero experts. The routers' tests draw both as well."""

import pytest
import torch

from nextscale.config.transformer import ExpertsConfig
from nextscale.pyramid import Pyramid
from nextscale.transformer.feed_forward.balance import compute_balance_loss
from nextscale.transformer.feed_forward.routers import Routing, compute_capacities
from tests.test_routers import PYRAMID, D, made, whole


@pytest.mark.parametrize(
    ("tokens", "factor", "ratio", "expected"),
    [(64, 1.1, 0.75, (16, 22)), (64, 1.0, 1.0, (16, 16)), (1, 1.1, 0.75, (1, 1)), (100, 0.5, 0.5, (10, 19))],
)
def test_capacities_by_hand(tokens, factor, ratio, expected):
    """8 FFN and 4 zero-computation experts, 3 active: 1.1 x 64 x 3 / (0.75 x 8 + 4) = 21.12, and 0.75 of
    it 15.84."""
    config = ExpertsConfig("moe++", capacity_factor=factor, capacity_ratio=ratio)
    assert compute_capacities(config, tokens) == expected


def test_a_full_expert_drops_the_last_tokens_and_the_balance_loss_still_counts_them():
    config = ExpertsConfig("moe++", count=2, active=1, copy=0, constant=0, capacity_factor=0.5, gating_residual=False)
    router, pyramid = made(config, Pyramid.parse("1,2,4")), Pyramid.parse("1,2,4")
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[1] = 1
    routing = router(torch.rand(2, pyramid.length, D), whole(pyramid))
    # 16 / (0.75 x 2 + 1) x 0.5 x 0.75 = 2.4 of the 16 tokens of the last scale, 3; and 1 of each earlier scale
    kept = [i in (0, 1, 5, 6, 7) for i in range(pyramid.length)]
    assert routing.selected_BNM[..., 1].tolist() == [kept, kept]
    assert routing.requested_BNM[..., 1].all()
    unlimited = Routing(routing.logits_BNM, routing.scores_BNM, routing.requested_BNM, routing.gates_BNM)
    assert torch.equal(compute_balance_loss(routing, 1), compute_balance_loss(unlimited, 1))


def test_a_renormalisation_without_zero_experts_leaves_a_token_of_them_alone_with_nothing():
    config = ExpertsConfig("moe++", count=2, active=2, zero=2, copy=0, constant=0, renormalise=True, exclude_zero=True)
    router = made(config, PYRAMID)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[2:] = 1
    routing = router(torch.rand(1, PYRAMID.length, D), whole(PYRAMID))
    assert routing.selected_BNM[..., 2:].all()
    assert torch.equal(routing.gates_BNM, torch.zeros_like(routing.gates_BNM))
