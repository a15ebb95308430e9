"""Building experts.c and blocks.c with the machine's own C compiler, if it has one, at their first use.

Without a compiler or without AVX-512 `load_kernels` gives None, and callers compute the same function in another way.
The library is kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache), named after all that decides it.
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
from typing import Any

import torch
from torch import Tensor

from nextscale.backends.cpu.products import wide_vectors
from nextscale.common.files import write_atomically

_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fPIC", "-fopenmp")
_BUILD_SECONDS = 120
_NOW = getattr(os, "RTLD_NOW", 2)
"""Missing symbols are found at loading, not at the first call."""

_POINTER, _NUMBER, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, dict[str, list[Any]]] = {
    "experts": {
        "run_slices": [_POINTER] * 7 + [_NUMBER] * 5 + [_FLAG] * 2 + [_POINTER] * 2,
        "run_experts": [_POINTER] * 9 + [_NUMBER] * 3 + [_FLAG] + [_POINTER] * 2,
        "choose_slices": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG, _POINTER],
    },
    "blocks": {
        "attend": [_POINTER] * 5 + [_NUMBER] * 6 + [_FLAG] * 2 + [_POINTER] * 2,
        "modulate": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG],
    },
}


def can_use_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can compute with these: in inference, on a CPU, in float32."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradient or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


@lru_cache(maxsize=8)
def load_kernels(name: str, vectors: int = 4) -> ctypes.CDLL | None:
    """The kernels of a source file, `vectors` of 16 values at once, built at the first call; None where they cannot be
    built or the CPU has no AVX-512."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not (wide_vectors and compiler):
        return None
    source, shared = (Path(__file__).with_name(file) for file in (f"{name}.c", "products.h"))
    flags = (*_FLAGS, f"-DVECTORS={vectors}")
    about = (compiler, flags, platform.machine(), platform.system(), _read_processor())
    key = hashlib.sha256(source.read_bytes() + shared.read_bytes() + repr(about).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextscale" / "kernels"
    library = folder / f"{name}-{key}.so"
    try:
        if not library.exists():
            _build(compiler, flags, source, library)
        kernels = ctypes.CDLL(str(library), mode=_NOW)
        for function, arguments in _ARGUMENTS[name].items():
            getattr(kernels, function).argtypes, getattr(kernels, function).restype = arguments, None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None  # the callers' other way is slower and gives the same function
    return kernels


def get_pointers(*tensors: Tensor) -> list[int]:
    """Addresses of the values of contiguous tensors."""
    assert all(t.is_contiguous() for t in tensors), "the kernels read contiguous tensors"
    return [t.data_ptr() for t in tensors]


def _build(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Linked without an OpenMP of its own: torch's is in the process, and a second one's threads would fight it."""
    with write_atomically(library) as (draft,):
        part = draft.with_suffix(".o")
        try:
            for command in ([*flags, "-c", str(source), "-o", str(part)], ["-shared", str(part), "-o", str(draft)]):
                subprocess.run([compiler, *command], check=True, capture_output=True, timeout=_BUILD_SECONDS)
        finally:
            part.unlink(missing_ok=True)


def _read_processor() -> str:
    """What the processor calls itself: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
