"""Building the C files of this folder with the machine's own C compiler, if it has one, at their first use.

Where that is impossible `load_kernels` gives None, warns once with the reason, and callers compute the same function in
another way. `explain_missing` gives the reason. The library is kept in the user's cache folder (XDG_CACHE_HOME or
~/.cache), named after all that decides it. It ends with a digest of itself, because loading a damaged one can kill the
process; a damaged one is built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.files import find_cache_folder, write_atomically
from nextscale.common.notes import print_note
from nextscale.common.precision import is_computed_in_float32

_ARM = platform.machine() in ("aarch64", "arm64")
LANES = 4 if _ARM else {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 0)
"""Values of the vectors that kernels compute with here, 4 by NEON; 0: there are no kernels for this CPU."""
MAX_VECTORS = 2 if LANES == 8 else 4
"""Vectors of a product's columns at once, at most: AVX2 has half of the registers of AVX-512 and NEON."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The kernels' numbers for types of weights."""

FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
_MACHINE = {16: ("-march=native",), 8: ("-mavx2", "-mfma", "-mf16c", "-mtune=native")}.get(LANES, ())
"""Every 64-bit ARM CPU has NEON."""
_SHARED = ("-shared", "-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ("-shared",)
"""The OpenMP functions are found when the library is loaded; Apple's linker has to be told."""
_BUILD_SECONDS = 120
_NOW = getattr(os, "RTLD_NOW", 2)
"""Missing symbols are found at loading, not at the first call."""

_POINTER, _NUMBER, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS: dict[str, dict[str, list[Any]]] = {
    "experts": {
        "run_slices": [_POINTER] * 7 + [_NUMBER] * 5 + [_FLAG] * 3 + [_NUMBER] + [_POINTER] * 2,
        "run_experts": [_POINTER] * 9 + [_NUMBER] * 3 + [_FLAG] * 2 + [_POINTER] * 2,
        "choose_slices": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG, _POINTER],
    },
    "linear": {"multiply": [_POINTER] * 4 + [_NUMBER] * 4 + [_FLAG] * 3 + [_POINTER]},
    "blocks": {
        "attend": [_POINTER] * 5 + [_NUMBER] * 6 + [_FLAG] * 2 + [_POINTER] * 2,
        "modulate": [_POINTER] * 4 + [_NUMBER] * 4 + [_REAL, _FLAG],
    },
    "int8": {
        "quantise": [_POINTER] * 4 + [_NUMBER] * 2 + [_FLAG] * 2,
        "finish": [_POINTER] * 6 + [_NUMBER] * 2 + [_FLAG] * 2,
        "finish_and_quantise": [_POINTER] * 8 + [_NUMBER] * 2 + [_FLAG] * 2,
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

    `size`: of "blocks" the width of heads, 32 or 64; of the others the vectors of a panel, up to MAX_VECTORS.
    """
    try:
        return _load(name, size)
    except _Impossible as error:
        reason = str(error)
    if LANES and reason not in _reasons.values():
        warnings.warn(f"the compiled CPU kernels are not used: {reason}; torch's operators run instead", stacklevel=2)
    _reasons[name, size] = reason
    return None


_reasons: dict[tuple[str, int], str] = {}


def explain_missing(name: str, size: int) -> str | None:
    """Why `load_kernels` gives None; None where it gives kernels."""
    return None if load_kernels(name, size) is not None else _reasons[name, size]


class _Impossible(Exception):
    """The kernels cannot be built or loaded; the message says why."""


def find_compiler() -> list[str]:
    """The command of the C compiler: CC, else cc, gcc or clang; empty without one."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return shlex.split(os.environ.get("CC", "")) or ([found] if found else [])


def _load(name: str, size: int) -> ctypes.CDLL:
    """As `load_kernels`; raises _Impossible."""
    compiler = find_compiler()
    if not LANES:
        raise _Impossible("the CPU has neither AVX-512, AVX2 nor NEON")
    if not compiler:
        raise _Impossible("there is no C compiler (cc, gcc or clang), and CC names none")
    source, shared = (Path(__file__).with_name(file) for file in (f"{name}.c", "products.h"))
    flags = (*FLAGS, *_MACHINE, *define_shape(name, size))
    about = (compiler, flags, platform.machine(), platform.system(), _read_processor())
    key = hashlib.sha256(source.read_bytes() + shared.read_bytes() + repr(about).encode()).hexdigest()[:20]
    try:
        library = find_cache_folder() / "kernels" / f"{name}-{key}.so"
        damaged = library.exists() and not _is_whole(library)
        if damaged:
            print_note("kernels", f"{library} was damaged, so these CPU kernels are built again")
        if damaged or not library.exists():
            _build(compiler, flags, source, library)
        kernels = ctypes.CDLL(str(library), mode=_NOW)
        for function, arguments in ARGUMENTS[name].items():
            getattr(kernels, function).argtypes, getattr(kernels, function).restype = arguments, None
    except (
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
    ) as error:  # such as no home folder, a full disk
        raise _Impossible(" ".join(str(error).split())) from error
    return kernels


def define_shape(name: str, size: int) -> list[str]:
    """The compiler's definitions of what a source file is built for; `size` as in `load_kernels`."""
    if name == "blocks":
        return [f"-DLANES={LANES}", f"-DHEAD={size}", f"-DVECTORS={min(size // LANES, MAX_VECTORS)}"]
    return [f"-DLANES={LANES}", f"-DVECTORS={size}"]


def get_pointers(*tensors: Tensor) -> list[int]:
    """Addresses of the values of contiguous tensors."""
    assert all(t.is_contiguous() for t in tensors), "the kernels read contiguous tensors"
    return [t.data_ptr() for t in tensors]


def _build(compiler: list[str], flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Several processes may build at once: each writes a file of its own, and one of them stays."""
    with write_atomically(library) as (draft,):
        part = draft.with_suffix(".o")
        try:
            _run_compiler([*compiler, *flags, "-c", str(source), "-o", str(part)])
            _run_compiler([*compiler, *_SHARED, str(part), "-o", str(draft)])
            content = draft.read_bytes()
            draft.write_bytes(content + hashlib.sha256(content).digest())
        finally:
            part.unlink(missing_ok=True)


def _is_whole(library: Path) -> bool:
    """Whether a library ends with the digest of what comes before."""
    content = library.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run_compiler(command: list[str]) -> None:
    """Run it; raises _Impossible with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _Impossible(f"the compiler {command[0]} took more than {_BUILD_SECONDS} s") from error
    except OSError as error:
        raise _Impossible(f"the compiler {command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise _Impossible(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    if not Path(command[-1]).exists():
        raise _Impossible(f"{command[0]} wrote no file")


def _read_processor() -> str:
    """What the processor calls itself: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
