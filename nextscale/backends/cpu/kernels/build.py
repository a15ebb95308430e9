"""The compiled kernels, the C files of this folder: those of the installed wheel, if it has them, else built by the
machine's own C compiler, if it has one, at their first use.

Where that is impossible `load_kernels` gives None, warns once with the reason, and callers compute the same function in
another way. `explain_missing` gives the reason. A library that was built is kept in the user's cache folder
(XDG_CACHE_HOME or ~/.cache), named after all that decides it. A damaged one is built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.backends.cpu.kernels.compilation import (
    FLAGS,
    FOLDER,
    MACHINES,
    Impossible,
    compile_library,
    count_vectors,
    define_shape,
    find_compiler,
    is_whole,
    name_library,
)
from nextscale.common.files import find_cache_folder, write_atomically
from nextscale.common.notes import print_note
from nextscale.common.precision import is_computed_in_float32

_ARM = platform.machine() in ("aarch64", "arm64")
LANES = 4 if _ARM else {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 0)
"""Values of the vectors that kernels compute with here, 4 by NEON; 0: there are no kernels for this CPU."""
MAX_VECTORS = count_vectors(LANES)
"""Vectors of a product's columns at once, at most."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The kernels' numbers for types of weights."""

_MACHINE = {16: ("-march=native",), 8: (*MACHINES[8], "-mtune=native")}.get(LANES, ())
"""What the compiler is told of this machine."""
IN_WHEEL = FOLDER / "compiled"
"""Where a wheel has libraries."""
_NOW = getattr(os, "RTLD_NOW", 2)
"""Missing symbols are found at loading, not at the first call."""

_POINTER, _NUMBER, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS: dict[str, dict[str, list[Any]]] = {
    "experts": {
        "run_slices": [_POINTER] * 7 + [_NUMBER] * 5 + [_FLAG] * 3 + [_NUMBER] + [_POINTER] * 2,
        "run_experts": [_POINTER] * 9 + [_NUMBER] * 3 + [_FLAG] * 2 + [_POINTER] * 2,
        "choose_slices": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG, _POINTER],
    },
    "training": {
        "attend_gradient": [_POINTER] * 9 + [_NUMBER] * 5 + [_FLAG] * 2 + [_POINTER] * 2,
        "gelu_or_gradient": [_POINTER] * 3 + [_NUMBER] + [_FLAG],
        "gradient_of_rows": [_POINTER] * 5 + [_NUMBER] * 5 + [_REAL, _FLAG],
    },
    "linear": {"multiply": [_POINTER] * 4 + [_NUMBER] * 4 + [_FLAG] * 3 + [_POINTER]},
    "blocks": {
        "attend": [_POINTER] * 5 + [_NUMBER] * 7 + [_FLAG] * 2 + [_POINTER] * 3,
        "modulate": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG],
    },
    "int8": {
        "quantise": [_POINTER] * 4 + [_NUMBER] * 2 + [_FLAG] * 2,
        "finish": [_POINTER] * 6 + [_NUMBER] * 2 + [_FLAG] * 2,
        "finish_and_quantise": [_POINTER] * 8 + [_NUMBER] * 2 + [_FLAG] * 2,
        "quantise_map": [_POINTER] * 2 + [_NUMBER] + [_REAL] * 2 + [_FLAG] * 2,
    },
}
"""Of each source file the functions and the types of their arguments."""


def can_use_kernels(x: Tensor, weight: Tensor, *, converts: bool = False) -> bool:
    """Whether the kernels can compute with these: in inference, on a CPU, in float32. With `converts` the weight may be
    of 16 bits where it is computed in float32."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    full = x.dtype == torch.float32 and (weight.dtype == x.dtype or (converts and is_computed_in_float32(weight)))
    if gradient or x.device.type != "cpu" or not full:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


@lru_cache(maxsize=16)
def load_kernels(name: str, size: int) -> ctypes.CDLL | None:
    """The kernels of a source file, built at the first call; None where they cannot be.

    `size`: of "blocks" and "training" the width of heads, 32 or 64; of the others the vectors of a panel, up to
    MAX_VECTORS.
    """
    try:
        return _load(name, size)
    except Impossible as error:
        reason = str(error)
    if LANES and reason not in _reasons.values():
        warnings.warn(f"the compiled CPU kernels are not used: {reason}; torch's operators run instead", stacklevel=2)
    _reasons[name, size] = reason
    return None


_reasons: dict[tuple[str, int], str] = {}


def explain_missing(name: str, size: int) -> str | None:
    """Why `load_kernels` gives None; None where it gives kernels."""
    return None if load_kernels(name, size) is not None else _reasons[name, size]


def _load(name: str, size: int) -> ctypes.CDLL:
    """As `load_kernels`; raises Impossible."""
    if not LANES:
        raise Impossible("the CPU has neither AVX-512, AVX2 nor NEON")
    try:
        kernels = ctypes.CDLL(str(_find_in_wheel(name, size) or _build(name, size)), mode=_NOW)
        for function, arguments in ARGUMENTS[name].items():
            getattr(kernels, function).argtypes, getattr(kernels, function).restype = arguments, None
    except (
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
    ) as error:  # such as no home folder, a full disk
        raise Impossible(" ".join(str(error).split())) from error
    return kernels


def comes_from_wheel(name: str, size: int) -> bool:
    """Whether `load_kernels` gives the library of the installed wheel."""
    kernels = load_kernels(name, size)
    return kernels is not None and Path(kernels._name).parent == IN_WHEEL


def _find_in_wheel(name: str, size: int) -> Path | None:
    """The library that was installed with nextscale, if it was installed from a wheel for this architecture."""
    library = IN_WHEEL / name_library(name, size, LANES)
    if not library.exists():
        return None
    if is_whole(library):
        return library
    print_note("kernels", f"{library} is damaged, so these CPU kernels are built; install nextscale anew")
    return None


def _build(name: str, size: int) -> Path:
    """The library in the cache folder, built if it is not there or damaged; raises Impossible.

    Several processes may build at once: each writes a file of its own, and one of them stays.
    """
    compiler = find_compiler()
    if not compiler:
        raise Impossible("there is no C compiler (cc, gcc or clang), and CC names none")
    source = FOLDER / f"{name}.c"
    shared = b"".join(header.read_bytes() for header in sorted(FOLDER.glob("*.h")))
    flags = (*FLAGS, *_MACHINE, *define_shape(name, size, LANES))
    about = (compiler, flags, platform.machine(), platform.system(), _read_processor())
    key = hashlib.sha256(source.read_bytes() + shared + repr(about).encode()).hexdigest()[:20]
    library = find_cache_folder() / "kernels" / f"{name}-{key}.so"
    damaged = library.exists() and not is_whole(library)
    if damaged:
        print_note("kernels", f"{library} was damaged, so these CPU kernels are built again")
    if damaged or not library.exists():
        with write_atomically(library) as (draft,):
            compile_library(compiler, flags, source, draft)
    return library


def get_pointers(*tensors: Tensor) -> list[int]:
    """Addresses of the values of contiguous tensors."""
    assert all(t.is_contiguous() for t in tensors), "the kernels read contiguous tensors"
    return [t.data_ptr() for t in tensors]


def _read_processor() -> str:
    """What the processor calls itself: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
