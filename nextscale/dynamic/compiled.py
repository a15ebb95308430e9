"""The compiled way of running experts on a CPU: kernel.c, built once by the machine's own C compiler if it has one.

Without a compiler, without AVX-512 or with NEXTSCALE_PLAIN=1, `load` gives None and `execute` goes another way to the
same function. The library is kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache), named after all that decides
it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale import ops
from nextscale.files import replacing

_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
_LANES, _MOST_ROWS = 16, 12
TILE = 512
"""Rows that pass over all experts together: their inputs and outputs, and one expert's weights, fill a second cache of
2 MiB in part; more would not save much, as an expert's weights are read once for so many."""
_BUILD_SECONDS = 120


def vectors_for(size: int) -> int:
    """How many vectors of outputs the kernel takes at once for experts of this size: none should be padding."""
    return 4 if size % (4 * _LANES) == 0 else 2


@lru_cache(maxsize=2)
def load(vectors: int) -> Callable[..., None] | None:
    """The kernel's entry, built at the first call; None where it cannot be built or would not be fast."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not (ops.fast and ops.wide_vectors and compiler):
        return None
    source = _SOURCE.read_bytes()
    flags = (*_FLAGS, f"-DVECTORS={vectors}")
    about = (compiler, flags, platform.machine(), platform.system(), _processor())
    name = hashlib.sha256(source + repr(about).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextscale" / "kernels"
    library = folder / f"experts-{name}.so"
    try:
        if not library.exists():
            with replacing(library) as (draft,):
                command = [compiler, *flags, str(_SOURCE), "-o", str(draft)]
                subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
        run = ctypes.CDLL(str(library)).run_experts
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None  # the other way is slower, and as good
    pointer, number = ctypes.c_void_p, ctypes.c_long
    run.argtypes = [pointer] * 6 + [number] * 5 + [ctypes.c_int, pointer, pointer]
    run.restype = None
    return run


def _processor() -> str:
    """What the processor calls itself: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


class Panels:
    """The experts' weights in the order in which the kernel reads them: in panels of 32 or 64 outputs, one step after
    another.

    `w1_FD`, `b1_F`, `w2_DF`: those of the whole FFN, float32, hidden units expert by expert.
    """

    def __init__(self, w1_FD: Tensor, b1_F: Tensor, w2_DF: Tensor, experts: int):
        self.experts, self.width, self.size = experts, w1_FD.shape[1], w1_FD.shape[0] // experts
        panel = vectors_for(self.size) * _LANES
        self.w1 = _panels(w1_FD.detach().unflatten(0, (experts, -1)), panel)
        self.w2 = _panels(w2_DF.detach().unflatten(1, (experts, -1)).transpose(0, 1), panel)
        self.b1 = F.pad(b1_F.detach().unflatten(0, (experts, -1)), (0, -self.size % panel)).contiguous()

    def add(self, run: Callable[..., None], x_TD: Tensor, chosen_TE: Tensor, relu: bool, into: Tensor) -> None:
        """Add the chosen experts' outputs to `into` (T, D); all contiguous, float32 and bool."""
        count, threads = len(x_TD), torch.get_num_threads()
        tile = min(TILE, -(-count // threads))
        spans = [(start, min(start + tile, count)) for start in range(0, count, max(tile, 1))]
        tensors = x_TD, chosen_TE, into, self.w1, self.b1, self.w2
        assert all(t.is_contiguous() for t in tensors), "the kernel reads rows that follow one another"
        pointers = [t.data_ptr() for t in tensors]

        def part(span: tuple[int, int]) -> None:
            rows = torch.empty(span[1] - span[0], dtype=torch.int64)
            hidden = torch.empty(_MOST_ROWS * self.b1.shape[1])
            run(*pointers, *span, self.experts, self.width, self.size, int(relu), rows.data_ptr(), hidden.data_ptr())

        if threads == 1 or len(spans) == 1:
            for span in spans:
                part(span)
        else:  # a call into the library leaves the interpreter free
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(part, spans))


def _panels(weight_EOI: Tensor, panel: int) -> Tensor:
    """(E, out, in) as (E, out / panel, in, panel), outputs padded with zeros."""
    padded: Any = F.pad(weight_EOI, (0, 0, 0, -weight_EOI.shape[1] % panel))
    return padded.unflatten(1, (-1, panel)).transpose(2, 3).contiguous()
