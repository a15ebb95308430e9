"""The compiled kernels of training steps, against formulas in float64."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends.cpu.kernels.gemm import multiply_matrices
from tests.conftest import examples, needs_kernels, threads


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_kernels("gemm")
@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(0, 40), st.sampled_from([0, 1, 31, 64, 300]), st.sampled_from([0, 1, 5, 383, 384, 800]),
    st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_matrix_products_equal_the_formula(rows, columns, depth, transposed, placed, thread_count, seed):
    """Shapes that fill no panel, more steps than are packed at once, strided operands, more threads than panels."""
    a = drawn(depth, 2 * rows, seed=seed).T[:rows] if transposed else drawn(rows, depth + 3, seed=seed)[:, 3:]
    b = drawn(depth, columns + 7, seed=seed + 1)[:, :columns]
    out = torch.full((rows, columns), torch.nan) if placed else None
    with threads(thread_count):
        c = multiply_matrices(a, b, out)
    assert out is None or c is out
    np.testing.assert_allclose(c.numpy(), a.double().numpy() @ b.double().numpy(), rtol=0, atol=2e-6 * (depth + 1))
    if rows:
        with threads(1):
            assert torch.equal(multiply_matrices(a[-1:], b)[0], c[-1]), "a row depends on the others or on threads"


@needs_kernels("gemm")
def test_matrix_products_refuse_columns_that_lie_apart():
    assert multiply_matrices(torch.ones(3, 4), torch.ones(5, 4).T) is None
