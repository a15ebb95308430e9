"""Wheels with the compiled kernels. Only `make soak` (NEXTSCALE_SOAK) builds some, as that takes half a minute."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from nextscale.backends.cpu.kernels import build, compilation, linear
from nextscale.backends.cpu.kernels.status import FAMILIES
from nextscale.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
CROSS = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64-static"
SAMPLE = """
import json, sys
import nextscale
from nextscale.backends.cpu.kernels.status import FAMILIES, come_from_wheel, explain_kernels
from nextscale.pipeline import Pipeline
images = Pipeline.from_pretrained(sys.argv[1], device="cpu", dtype="float32").sample([0, 3], cfg=2.0, seed=1)
facts = {
    "package": nextscale.__file__, "missing": explain_kernels(), "wheel": [come_from_wheel(f) for f in FAMILIES],
    "tokens": images.tokens.tolist(),
}
print(json.dumps(facts))
"""
LOAD = """
#include <dlfcn.h>
#include <omp.h>
#include <stdio.h>
int main(int count, char **paths)
{
#pragma omp parallel
    omp_get_thread_num();
    for (int i = 1; i < count; i++)
        if (!dlopen(paths[i], RTLD_NOW)) return puts(dlerror()), 1;
    return 0;
}
"""


@pytest.fixture
def build_wheel(tmp_path):
    """A function that builds the wheel with these environment variables; its path and the libraries in it."""
    if "NEXTSCALE_SOAK" not in os.environ:
        pytest.skip("only in make soak")
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (the extra test has it)")

    def build_one(**environment):
        command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
        env = os.environ | {"PIP_CACHE_DIR": str(tmp_path / "pip")} | environment
        folder = tmp_path / "wheels"
        subprocess.run([*command, "-w", str(folder)], env=env, check=True, capture_output=True)
        (wheel,) = folder.iterdir()
        names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
        return wheel, sorted(Path(name).name for name in names)

    return build_one


def list_files(architecture):
    return sorted(
        compilation.name_library(name, size, lanes)
        for lanes in compilation.LANES_OF[architecture]
        for name, size in compilation.list_libraries(lanes)
    )


@pytest.mark.skipif(
    sys.platform != "linux" or build.LANES not in (8, 16) or not compilation.find_compiler(),
    reason="needs Linux on x86-64 with AVX2, and a C compiler",
)
def test_an_installed_wheel_samples_the_same_without_a_compiler(build_wheel, tmp_path):
    wheel, libraries = build_wheel()
    assert re.fullmatch(r"nextscale-.*-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    assert libraries == list_files("x86_64")
    site, empty, cache = tmp_path / "site", tmp_path / "empty", tmp_path / "cache"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    empty.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"PATH": str(empty), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(site)}
    model = ROOT / "models/var-cifar10"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SAMPLE, str(model)],
        env=env, cwd=empty, check=True, capture_output=True, text=True,
    )  # fmt: skip
    facts = json.loads(done.stdout.splitlines()[-1])
    assert Path(facts["package"]).is_relative_to(site)
    assert set(facts["missing"].values()) == {None}
    assert all(facts["wheel"])
    assert not cache.exists(), "nothing was built"
    here = Pipeline.from_pretrained(model, device="cpu", dtype="float32").sample([0, 3], cfg=2.0, seed=1)
    assert facts["tokens"] == here.tokens.tolist()


@pytest.mark.skipif(not shutil.which(CROSS), reason=f"no {CROSS} (Debian: gcc-aarch64-linux-gnu)")
def test_a_cross_compiler_builds_the_wheel_of_its_architecture(build_wheel, tmp_path):
    wheel, libraries = build_wheel(CC=CROSS)
    assert wheel.name.endswith("-py3-none-manylinux_2_17_aarch64.whl")
    assert libraries == list_files("aarch64")
    zipfile.ZipFile(wheel).extractall(tmp_path / "content")
    paths = list((tmp_path / "content").rglob("*.so"))
    for path in paths:
        content = path.read_bytes()
        assert content[:4] == b"\x7fELF"
        assert int.from_bytes(content[18:20], "little") == 183, "64-bit ARM"
        assert compilation.is_whole(path)
    if not shutil.which(EMULATOR):
        pytest.skip(f"no {EMULATOR} (Debian: qemu-user-static)")
    (tmp_path / "load.c").write_text(LOAD)
    program = tmp_path / "load"
    subprocess.run([CROSS, "-fopenmp", str(tmp_path / "load.c"), "-o", str(program), "-ldl"], check=True)
    run = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program), *map(str, paths)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_compiler_the_wheel_is_pure(build_wheel, tmp_path):
    (tmp_path / "empty").mkdir()
    wheel, libraries = build_wheel(PATH=str(tmp_path / "empty"), CC="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not libraries


needs_vectors = pytest.mark.skipif(
    not build.LANES or not compilation.find_compiler(), reason="no kernels for this CPU, or no C compiler"
)


@needs_vectors
def test_a_library_of_the_wheel_is_loaded_and_a_damaged_one_is_not(tmp_path, monkeypatch, capfd):
    name, size, lanes = "linear", build.MAX_VECTORS, build.LANES
    library = tmp_path / compilation.name_library(name, size, lanes)
    flags = (*compilation.FLAGS, *compilation.MACHINES[lanes], *compilation.define_shape(name, size, lanes))
    source = compilation.FOLDER / f"{name}.c"
    compilation.compile_library(compilation.find_compiler(), flags, source, library)
    monkeypatch.setattr(build, "IN_WHEEL", tmp_path)
    monkeypatch.setattr(build, "_reasons", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()
    try:
        x, weight = torch.randn(5, 40), torch.randn(33, 40).bfloat16()
        kernels = build.load_kernels(name, size)
        assert build.comes_from_wheel(name, size)
        torch.testing.assert_close(linear.run(kernels, x, weight, None, False), x @ weight.float().T)
        assert not (tmp_path / "cache").exists()

        content = library.read_bytes()
        library.unlink()  # it is loaded
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        build.load_kernels.cache_clear()
        with pytest.warns(UserWarning, match="there is no C compiler"):
            assert build.load_kernels(name, size) is None
        assert not build.comes_from_wheel(name, size)
        assert f"{library} is damaged, so these CPU kernels are built; install nextscale anew" in capfd.readouterr().out
    finally:
        build.load_kernels.cache_clear()


def test_a_wheel_has_every_library_that_is_loaded():
    assert {one for family in FAMILIES.values() for one in family} <= set(compilation.list_libraries(build.LANES or 8))
    assert {name for name, _ in compilation.list_libraries(16)} == set(build.ARGUMENTS)
