"""A dense FFN is divided into experts by clusters of its units, and computes what it did."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from nextscale.pipeline import Pipeline
from nextscale.sparsify.cluster import assign_balanced, run_balanced_kmeans
from nextscale.sparsify.convert import replace_gelu, split_ffns
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import difference, make_context, run

# ---- clusters


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_clusters_are_balanced_whatever_the_width(count, size, width, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count * size, width, generator=rng)
    x[: count * size // 2] = x[0].clone()  # many equal points, as dead units are
    labels = run_balanced_kmeans(x, count, rng)
    assert torch.bincount(labels, minlength=count).tolist() == [size] * count


def test_clusters_find_groups_that_are_there_and_a_seed_decides_them():
    rng = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(6, 16, generator=rng))
    truth = torch.arange(6).repeat_interleave(10)[torch.randperm(60, generator=rng)]
    x = (centres[truth] + 0.02 * torch.randn(60, 16, generator=rng)) * torch.rand(60, 1, generator=rng)
    a, b = (run_balanced_kmeans(x, 6, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert len({(i, j) for i, j in zip(truth.tolist(), a.tolist(), strict=True)}) == 6


@pytest.mark.parametrize(("points", "count"), [(60, 5), (64, 2), (48, 16)])
def test_assignment_costs_hardly_more_than_the_cheapest(points, count):
    cost = torch.rand(points, count, generator=torch.Generator().manual_seed(points))
    labels = assign_balanced(cost)
    repeated = np.repeat(cost.numpy(), points // count, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    by_chance = points * cost.mean().item()
    assert cost.gather(1, labels[:, None]).sum().item() - best <= 0.02 * (by_chance - best)


# ---- the split


@settings(deadline=None, max_examples=8)
@given(st.sampled_from([8, 16, 64, 128]), st.booleans(), st.integers(0, 9))
def test_the_split_is_a_permutation_and_computes_what_the_dense_model_did(size, relu, seed):
    dense = randomised(tiny_config(depth=1)).to_checkpoint()
    if relu:
        dense = replace_gelu(dense, 2, late_only=False)
    after = split_ffns(dense, size, 2, 8, seed)
    for name, tensor in dense.transformer.items():
        if ".ffn.fc1" in name:
            assert sorted(map(tuple, after.transformer[name].view(128, -1).tolist())) == sorted(
                map(tuple, tensor.view(128, -1).tolist())
            )
        elif ".ffn.fc2.weight" not in name:
            assert torch.equal(after.transformer[name], tensor), name
    before, made = (Pipeline.from_checkpoint(c) for c in (dense, after))
    expected = run(before).logits_BNV
    assert difference(run(made).logits_BNV, expected) <= 1e-5
    everything = Thresholds((1.0,) * 4)
    assert difference(run(made, everything).logits_BNV, expected) <= 1e-5
    assert torch.equal(run(made, everything).logits_BNV, run(made).logits_BNV)


def test_relu_replaces_gelu_everywhere_or_at_late_scales_alone():
    dense = randomised(tiny_config(depth=2)).to_checkpoint()
    whole, late = (Pipeline.from_checkpoint(replace_gelu(dense, 2, own)) for own in (False, True))
    before = run(Pipeline.from_checkpoint(dense)).logits_BNV
    start = 1 + 4
    assert torch.equal(run(late).logits_BNV[:, :start], before[:, :start])
    assert difference(run(late).logits_BNV[:, start:], before[:, start:]) > 1e-3
    assert difference(run(whole).logits_BNV[:, :start], before[:, :start]) > 1e-3
    layer = whole.transformer.blocks[0].ffn
    x = torch.randn(2, 1, 32)
    with torch.no_grad():
        y, _ = layer(x, make_context(whole))
        expected = np.maximum(x.numpy() @ layer.fc1.weight.numpy().T + layer.fc1.bias.numpy(), 0)
        expected = expected @ layer.fc2.weight.numpy().T + layer.fc2.bias.numpy()
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-5)
