"""The CPU kernels in NEON's vectors, on an emulated ARM processor: the tests of the kernels themselves run there.

A tenth of their examples here, and one of two large cases; `make soak` (NEXTSCALE_SOAK) takes all.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT, SOAK = Path(__file__).parents[1], "NEXTSCALE_SOAK" in os.environ
MISSING = [tool for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64-static") if shutil.which(tool) is None]
TESTS = (
    "tests/test_block_kernels.py",
    "tests/test_kernels.py",
    "tests/test_training_kernels.py",
    "tests/test_dynamic.py::test_execution_equals_a_loop_over_tokens_and_experts",
    "tests/test_int8.py::test_rows_are_within_half_a_step",
    "tests/test_int8.py::test_a_layer_is_an_exact_sum_of_integers",
)
LONG = ("depend_on_rows", "do_not_depend", "does_not_depend", "520-dtype1", "192-6")
CHOSEN = () if SOAK else ("-k", " and ".join(f"not {name}" for name in LONG))


@pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} (Debian: gcc-aarch64-linux-gnu, qemu-user-static)"
)
def test_kernels_compute_the_same_by_neon():
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "tests.emulation.neon"]
    env = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST", "OMP"))}
    env |= {"PYTHONPATH": str(ROOT), "NEXTSCALE_EXAMPLES": "1" if SOAK else "0.1"}
    done = subprocess.run([*command, *CHOSEN, *TESTS], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
