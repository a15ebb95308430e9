"""Compiles the CPU kernels into wheels for Linux, so that users without a C compiler have them.

`CC` selects the compiler; a cross compiler gives the wheel of its architecture. Without a compiler, and for other
systems, the wheel is pure Python: there the kernels are compiled at their first use, if there is a compiler then.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "nextscale/backends/cpu/kernels"
OLDEST_GLIBC = 17
"""2.17, the oldest C library that wheels are made for."""


class KernelsHook(BuildHookInterface):
    """Adds compiled kernels to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version`: editable, or standard. Changes the files and the tag of the wheel."""
        if version == "editable":  # which uses the sources where they are
            return
        compilation = load_compilation(Path(self.root))
        self.folder = Path(tempfile.mkdtemp())
        try:
            compiler = compilation.find_compiler()
            architecture = find_architecture(compiler, compilation)
            libraries = compile_kernels(compilation, compiler, architecture, self.folder)
        except compilation.Impossible as error:
            self.app.display_warning(f"the wheel has no compiled CPU kernels: {error}")
            return
        build_data["force_include"] |= {str(path): f"{KERNELS}/compiled/{path.name}" for path in libraries}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{find_glibc(libraries)}_{architecture}"
        self.app.display_info(f"{len(libraries)} CPU kernels by {' '.join(compiler)}: {build_data['tag']}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel is written."""
        if version != "editable":
            shutil.rmtree(self.folder)


def load_compilation(root: Path) -> ModuleType:
    """The module that compiles kernels, without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("compilation", root / KERNELS / "compilation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_architecture(compiler: list[str], compilation: ModuleType) -> str:
    """What the compiler compiles for, x86_64 or aarch64; Impossible without one, and for systems other than Linux."""
    if not compiler:
        raise compilation.Impossible("there is no C compiler (cc, gcc or clang), and CC names none")
    try:
        done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise compilation.Impossible(f"{compiler[0]} does not say what it compiles for: {error}") from error
    machine = done.stdout.strip()
    architecture = machine.split("-")[0]
    if architecture not in compilation.LANES_OF or "linux" not in machine or "musl" in machine:
        raise compilation.Impossible(f"{machine} is neither Linux on x86-64 nor on 64-bit ARM, with glibc")
    return architecture


def compile_kernels(compilation: ModuleType, compiler: list[str], architecture: str, folder: Path) -> list[Path]:
    """The libraries for all vectors of an architecture, in `folder`."""

    def compile_one(library: tuple[str, int, int]) -> Path:
        name, size, lanes = library
        flags = (*compilation.FLAGS, *compilation.MACHINES[lanes], *compilation.define_shape(name, size, lanes))
        path = folder / compilation.name_library(name, size, lanes)
        compilation.compile_library(compiler, flags, compilation.FOLDER / f"{name}.c", path)
        return path

    libraries = [(*one, n) for n in compilation.LANES_OF[architecture] for one in compilation.list_libraries(n)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, libraries))


def find_glibc(libraries: list[Path]) -> int:
    """The minor number of the glibc that all libraries can be loaded with: of the newest symbol that they need."""
    needed = [re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes()) for path in libraries]
    return max([OLDEST_GLIBC, *(int(number) for numbers in needed for number in numbers)])
