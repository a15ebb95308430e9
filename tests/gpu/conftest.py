"""The device under test: the machine's GPU. Without one this folder is one skipped test.

NEXTSCALE_GPU_TESTS=cpu runs the same tests on the CPU instead, which shows that they work.
"""

import os

import pytest
import torch

CHOSEN = os.environ.get("NEXTSCALE_GPU_TESTS", "")
KIND = CHOSEN or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "")

collect_ignore_glob = ["test_present.py"] if KIND else ["test_gpu_*.py"]


@pytest.fixture(scope="session")
def device():
    """The device under test, with its index."""
    return torch.device(KIND, 0) if KIND == "cuda" else torch.device(KIND)


@pytest.fixture
def cuda(device):
    """The device, where it has graphs and reports its memory and its waits."""
    if device.type != "cuda":
        pytest.skip("this needs CUDA")
    return device
