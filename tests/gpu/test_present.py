"""What is left of this folder on a machine without a GPU."""

import pytest


@pytest.mark.skip(reason="no GPU here: tests/gpu runs where CUDA or MPS is present")
def test_a_gpu_is_present():
    """Skipped."""
