"""Compiling the C files of this folder to libraries: for this machine at their first use, or all of them for a wheel.

Building a wheel loads this file by its path, without nextscale and torch, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
HEADS = (32, 64)
"""Head widths that blocks.c and training.c are compiled for."""
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
MACHINES = {
    16: ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    8: ("-mavx2", "-mfma", "-mf16c"),
    4: (),
}
"""The instructions for vectors of so many values: AVX-512, AVX2, and NEON, which every 64-bit ARM CPU has."""
LANES_OF = {"x86_64": (8, 16), "aarch64": (4,)}
"""The vectors that wheels for an architecture have kernels for."""
_SHARED = ("-shared", "-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ("-shared",)
"""The OpenMP functions are found when the library is loaded; Apple's linker has to be told."""
_BUILD_SECONDS = 120


class Impossible(Exception):
    """The kernels cannot be compiled or loaded; the message says why."""


def count_vectors(lanes: int) -> int:
    """Vectors of a product's columns at once, at most: AVX2 has half of the registers of AVX-512 and NEON."""
    return 2 if lanes == 8 else 4


def list_libraries(lanes: int) -> list[tuple[str, int]]:
    """The (name, size) of all libraries that vectors of so many values may need; `size` as in `define_shape`."""
    names = sorted(source.stem for source in FOLDER.glob("*.c"))
    sizes = {"blocks": HEADS, "training": HEADS}
    return [(name, n) for name in names for n in sizes.get(name, sorted({2, count_vectors(lanes)}))]


def define_shape(name: str, size: int, lanes: int) -> list[str]:
    """The compiler's definitions of what a source file is compiled for.

    `size`: of "blocks" and "training" the width of heads; of the others the vectors of a panel, up to `count_vectors`.
    """
    if name in ("blocks", "training"):
        return [f"-DLANES={lanes}", f"-DHEAD={size}", f"-DVECTORS={min(size // lanes, count_vectors(lanes))}"]
    return [f"-DLANES={lanes}", f"-DVECTORS={size}"]


def name_library(name: str, size: int, lanes: int) -> str:
    """The file's name in a wheel."""
    return f"{name}-{lanes}-{size}.so"


def find_compiler() -> list[str]:
    """The command of the C compiler: CC, else cc, gcc or clang; empty without one."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return shlex.split(os.environ.get("CC", "")) or ([found] if found else [])


def compile_library(compiler: list[str], flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Write the library of a C file, with its digest at the end. Raises Impossible."""
    part = library.with_suffix(".o")
    try:
        _run_compiler([*compiler, *flags, "-c", str(source), "-o", str(part)])
        _run_compiler([*compiler, *_SHARED, str(part), "-o", str(library)])
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
    finally:
        part.unlink(missing_ok=True)


def is_whole(library: Path) -> bool:
    """Whether a library ends with the digest of what comes before: loading a damaged one can kill the process."""
    content = library.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run_compiler(command: list[str]) -> None:
    """Run it; raises Impossible with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Impossible(f"the compiler {command[0]} took more than {_BUILD_SECONDS} s") from error
    except OSError as error:
        raise Impossible(f"the compiler {command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise Impossible(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    if not Path(command[-1]).exists():
        raise Impossible(f"{command[0]} wrote no file")
