"""Building experts.c with the machine's own C compiler, if it has one, at its first use.

Without a compiler, without AVX-512 or with NEXTSCALE_PLAIN=1, `load` gives None and callers go another way to the same
function. The library is kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache), named after all that decides it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nextscale import ops
from nextscale.files import replacing

_SOURCE = Path(__file__).with_name("experts.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp")
_BUILD_SECONDS = 120
_NOW = getattr(os, "RTLD_NOW", 2)
"""Missing symbols are found at loading, not at the first call."""


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels may compute a product of these: in inference, on a CPU, in float32."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradient or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    return ops.fast and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


@lru_cache(maxsize=2)
def load(vectors: int = 4) -> ctypes.CDLL | None:
    """The kernels, `vectors` of 16 outputs at once, built at the first call; None where they cannot be built or would
    not be fast."""
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
            _build(compiler, flags, library)
        found = ctypes.CDLL(str(library), mode=_NOW)
        pointer, number, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        found.run_slices.argtypes = [pointer] * 6 + [number] * 5 + [flag] * 2 + [pointer] * 2
        found.run_experts.argtypes = [pointer] * 9 + [number] * 3 + [flag] + [pointer] * 2
        found.choose_slices.argtypes = [pointer] * 4 + [number] * 4 + [ctypes.c_float, flag, pointer]
        found.run_slices.restype = found.run_experts.restype = found.choose_slices.restype = None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None  # the other way is slower, and as good
    return found


def _build(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Linked without an OpenMP of its own: torch's is in the process, and a second one's threads would fight it."""
    with replacing(library) as (draft,):
        part = draft.with_suffix(".o")
        try:
            for command in ([*flags, "-c", str(_SOURCE), "-o", str(part)], ["-shared", str(part), "-o", str(draft)]):
                subprocess.run([compiler, *command], check=True, capture_output=True, timeout=_BUILD_SECONDS)
        finally:
            part.unlink(missing_ok=True)


def _processor() -> str:
    """What the processor calls itself: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
