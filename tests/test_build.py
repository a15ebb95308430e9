"""Building the compiled kernels: by any compiler, by several processes at once, and what is said where it fails."""

import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from nextscale.backends.cpu.kernels import blocks, build, compilation
from nextscale.backends.cpu.kernels.status import FAMILIES, explain_kernels
from tests import forked

needs_vectors = pytest.mark.skipif(not build.LANES, reason="there are no kernels for this CPU")


def attend() -> None:
    """Build and use a kernel, in a process of its own, where a warning is an error."""
    warnings.simplefilter("error", UserWarning)
    qkv = torch.randn(2, 21, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    y = blocks.attend(qkv, None, 0, torch.full((2,), 0.3), False)
    assert y is not None, build.explain_missing("blocks", 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    assert (y - plain).abs().max() < 1e-5


def explain_linear() -> None:
    """Say why the kernels of products are missing, in a process of its own."""
    print(build.explain_missing("linear", 2))


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """No kernel is loaded or stored; a function that writes a compiler of these lines of shell."""

    def use_compiler(lines):
        compiler = tmp_path / "my-cc"
        compiler.write_text(f"#!/bin/sh\n{lines}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_reasons", {})
    build.load_kernels.cache_clear()
    yield use_compiler
    build.load_kernels.cache_clear()


@needs_vectors
@pytest.mark.parametrize(("compiler", "processes"), [("gcc", 2), ("clang", 1)])
def test_processes_build_at_once_and_with_either_compiler(compiler, processes, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    cache = tmp_path / "cache"
    runs = [
        forked.start(attend, files=tmp_path / f"said-{i}", CC=compiler, XDG_CACHE_HOME=str(cache)) for i in range(2)
    ]
    for run in runs:
        status, _, errors = run.end()
        assert status == 0, errors
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".so"]


@needs_vectors
@pytest.mark.skipif(not compilation.find_compiler(), reason="there is no C compiler")
def test_a_damaged_library_is_built_again(tmp_path):
    """Loading it would kill the process. By two processes at once; where building fails, torch's operators run."""
    compiler = tmp_path / "my-cc"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(compilation.find_compiler())} "$@"\n')
    compiler.chmod(0o755)
    places = {"CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def load(processes):
        runs = [forked.start(explain_linear, files=tmp_path / f"said-{i}", **places) for i in range(processes)]
        answers = [run.end() for run in runs]
        assert [status for status, *_ in answers] == [0] * processes, answers
        return [(out, errors) for _, out, errors in answers]

    assert load(1) == [("None\n", "")]
    (library,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    whole, note = library.read_bytes(), f"note: {library} was damaged, so these CPU kernels are built again\n"
    library.write_bytes(whole[: len(whole) // 2])
    found = [out for out, _ in load(2)]
    assert sorted(found)[-1] == f"{note}None\n"
    assert set(found) <= {f"{note}None\n", "None\n"}, "the second one may come when it is built"
    assert library.read_bytes() == whole

    library.write_bytes(bytes(range(256)) * 64)
    compiler.write_text("#!/bin/sh\nexit 3\n")
    [(out, errors)] = load(1)
    assert out == f"{note}my-cc failed: exit status 3\n".replace("my-cc", str(compiler))
    assert "my-cc failed: exit status 3; torch's operators run instead" in errors


FAILURES = {
    "exit 3": "my-cc failed: exit status 3",
    "echo note >&2; echo 'a.c:1: error: odd' >&2; exit 1": "my-cc failed: a.c:1: error: odd",
    "echo 'a.s: fatal error: writing a.o: No space left on device' >&2; exit 1": "No space left on device",
    "exit 0": "my-cc wrote no file",
}


@needs_vectors
@pytest.mark.parametrize(("lines", "reason"), FAILURES.items())
def test_a_compiler_that_fails_is_named_once(lines, reason, unbuilt, tmp_path):
    unbuilt(lines)
    with pytest.warns(UserWarning, match="the compiled CPU kernels are not used: .*; torch's operators run instead"):
        assert build.load_kernels("experts", 2) is None
    assert reason in build.explain_missing("experts", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load_kernels("blocks", 32) is None, "with the same reason, which is not said again"
        found = explain_kernels()
    assert all(reason in found[family] for family in FAMILIES)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_vectors
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CC", "/nowhere/cc -m64", "the compiler /nowhere/cc cannot be run: No such file"),
        ("PATH", "/nowhere", "there is no C compiler"),
        ("XDG_CACHE_HOME", str(Path(__file__)), "is a file, not a folder"),
    ],
)
def test_without_compiler_or_folder_the_plain_path_runs(name, value, reason, unbuilt, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    if name == "XDG_CACHE_HOME" and not compilation.find_compiler():
        pytest.skip("there is no C compiler")
    monkeypatch.setenv(name, value)
    from nextscale.backends.cpu.attention import CpuAdaLayerNorm

    x, one = torch.randn(2, 3, 32), torch.randn(2, 1, 32)
    with torch.no_grad(), pytest.warns(UserWarning, match=reason):
        y = CpuAdaLayerNorm(1e-6)(x, one, one)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * (1 + one) + one)


def test_a_cpu_without_wide_vectors_is_no_failure(unbuilt, monkeypatch):
    monkeypatch.setattr(build, "LANES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain_kernels()["attention"] == "the CPU has neither AVX-512, AVX2 nor NEON"
