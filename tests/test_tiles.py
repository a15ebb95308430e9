"""Products of groups of rows in tiles: by torch, and by the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nextscale.backends.cuda.experts import TiledExperts
from nextscale.backends.cuda.tiles import TorchProducts, activate, load_products, plan_tiles
from nextscale.backends.twins import swap_module
from nextscale.config.transformer import DynamicConfig, TransformerConfig
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.experts import Dispatch, Experts

TWIN = "nextscale.backends.cuda.dynamic:CudaDynamicFeedForward"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}
CASES = {
    "even": (40, 4, 0.5), "one row": (1, 3, 1.0), "none selected": (5, 3, 0.0), "all selected": (70, 3, 1.0),
    "few": (33, 5, 0.1),
}  # fmt: skip
"""Rows, groups, share of the pairs that are selected."""


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dispatch(rows, groups, share):
    """Pairs, of which some are padding."""
    selected = torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)) < share
    return selected, Dispatch.create(selected, rows * groups)


def assert_near(found, expected, tolerance):
    assert found.dtype == expected.dtype
    difference = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    assert difference <= tolerance * max(expected.abs().max().item() if found.numel() else 1.0, 1.0), difference


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_against_loops_over_the_groups(case, dtype):
    """Rows that are gathered, with bias and activation; rows that are added with gates; and the matrices' gradient."""
    (rows, groups, share), (K, N), tolerance = CASES[case], (24, 70), DTYPES[dtype]
    pairs = dispatch(rows, groups, share)[1]
    products, tiles = load_products(torch.device("cpu")), plan_tiles(pairs.ends_M, len(pairs.row_R))
    assert isinstance(products, TorchProducts) != INTERPRETED
    x, weight, bias = draw(rows, K, dtype=dtype), draw(groups, N, K, dtype=dtype, seed=1), draw(groups, N, dtype=dtype)
    back, gate = draw(groups, K, N, dtype=dtype, seed=2), draw(len(pairs.row_R), seed=3)
    for activation in ("", "relu", "gelu"):
        hidden = products.multiply(x, weight, tiles, pairs.row_R, bias, activation)
        for m, row in pairs_of(pairs):
            expected = activate(x[row].double() @ weight[m].double().T + bias[m].double(), activation).to(dtype)
            start = int(pairs.ends_M[m - 1]) if m else 0
            assert_near(hidden[start : int(pairs.ends_M[m])], expected, tolerance)
    hidden = torch.where((torch.arange(len(hidden)) < pairs.ends_M[-1]).unsqueeze(1), hidden, torch.nan)
    into, expected = draw(rows, K, seed=4), draw(rows, K, seed=4).double()
    products.multiply(hidden, back, tiles, pairs.row_R, gate_R=gate, into=into)
    outer = products.add_outer_products(hidden, x[pairs.row_R], tiles)
    for m, row in pairs_of(pairs):
        part = slice(int(pairs.ends_M[m - 1]) if m else 0, int(pairs.ends_M[m]))
        expected[row] += gate[part, None].double() * (hidden[part].double() @ back[m].double().T)
        assert_near(outer[m], (hidden[part].double().T @ x[row].double()).to(dtype), tolerance)
    assert_near(into, expected.float(), tolerance)


def pairs_of(pairs):
    start = 0
    for m, end in enumerate(pairs.ends_M.tolist()):
        yield m, pairs.row_R[start:end]
        start = end


@pytest.mark.parametrize("case", CASES)
def test_experts_and_their_gradients_against_the_plain_module(case):
    rows, groups, share = CASES[case]
    layer = Experts(groups, 20, 36)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5
    selected, pairs = dispatch(rows, groups, share)
    outputs = []
    for tiled in (True, False):
        x, gates = draw(rows, 20, seed=8).requires_grad_(), draw(rows, groups, seed=9).requires_grad_()
        gate = torch.where(selected, gates, 0)[pairs.row_R, pairs.expert_R]
        layer.zero_grad()
        y = (
            TiledExperts.apply(x, gate, pairs.row_R, pairs.ends_M, *layer.weights)
            if tiled
            else layer.run(x, gate, pairs)
        )
        if y.requires_grad:
            (y * draw(rows, 20, seed=10)).sum().backward()
        outputs.append([y, *(torch.zeros(()) if t.grad is None else t.grad for t in (x, gates, *layer.weights))])
    for found, expected in zip(*outputs, strict=True):
        assert_near(found, expected.expand_as(found), 2e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels need a GPU, or Triton's interpreter: the test below runs it")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_experts_skip_what_is_not_selected(dtype, relu):
    settings = DynamicConfig(experts=4, scales=2, router_width=8, late_ffn=relu, activation="relu" if relu else "gelu")
    layer = DynamicFeedForward(TransformerConfig(depth=1, width=32, heads=4, dynamic=settings), 3)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5
    layer.to(dtype)
    twin = swap_module(layer, {"nextscale.transformer.feed_forward.dynamic:DynamicFeedForward": TWIN})
    for rows, share in ((45, 0.3), (1, 1.0), (70, 0.9)):
        x, selected = draw(rows, 32, dtype=dtype), dispatch(rows, 4, share)[0]
        with torch.no_grad():
            expected = layer.run_experts(x, selected, relu)
            assert_near(twin.run_experts(x, selected, relu), expected, DTYPES[dtype] * 3)
            inputs = x.clone()
            inputs[~selected.any(dim=1)] = torch.nan  # rows without an expert are not even read
            assert_near(twin.run_experts(inputs, selected, relu), expected, DTYPES[dtype] * 3)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: its kernels cannot be interpreted")
def test_the_kernels_pass_the_same_tests_in_tritons_interpreter():
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-n0"], cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
