"""Checks of what is around nextscale: versions, optional packages, folders, free space, the hub. They need no torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from nextscale.common.extras import get_project, install_command, is_absent
from nextscale.common.files import find_cache_folder
from nextscale.doctor.result import Result

_LEAST_PYTHON, _LEAST_TORCH = (3, 11), (2, 11)
_NEEDED = ("numpy", "pillow", "pyyaml", "safetensors", "huggingface_hub", "tyro", "tqdm")
_OPTIONAL = {
    "matplotlib": "curves and other plots need",
    "sklearn": "the bundled digits and t-SNE need",
    "pyarrow": "parquet files need",
    "transformers": "DINOv2 and DINOv3 need",
    "tensorboard": "the tensorboard logger needs",
}
"""Package: what needs it."""
_LEAST_BYTES = 2 * 2**30
"""Free space below which a training state of a small model may not fit."""


def check_versions() -> Iterator[Result]:
    """Python, torch and the packages without which nextscale does not run."""
    from nextscale import __version__

    python = platform.python_version()
    if sys.version_info < _LEAST_PYTHON:
        yield Result("python", "fail", python, "nextscale needs Python 3.11 or newer")
    else:
        yield Result("python", "pass", f"{python}, {platform.platform()}", values={"nextscale": __version__})
    versions, missing = {}, []
    for name in _NEEDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Result("packages", "fail", f"missing: {', '.join(missing)}", "pip install -U nextscale")
    else:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Result("packages", "pass", f"nextscale {__version__}, {listed}", values=versions)
    yield _check_torch()


def _check_torch() -> Result:
    try:
        torch = import_module("torch")
    except Exception as error:
        what = f"torch cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return Result("torch", "fail", what, "install torch 2.11 or newer for this machine, see pytorch.org")
    version = torch.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < _LEAST_TORCH:
        return Result("torch", "fail", version, "nextscale needs torch 2.11 or newer: pip install -U torch")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    capability = torch.backends.cpu.get_cpu_capability()
    return Result(
        "torch", "pass", f"{version}, built with {built}; vector instructions in use: {capability}",
        values={"torch": version, "cuda": torch.version.cuda, "capability": capability},
    )  # fmt: skip


def check_extras() -> Iterator[Result]:
    """Optional packages: each is tried, since one that is installed may still fail to import."""
    for package, use in _OPTIONAL.items():
        name = get_project(package)
        try:
            import_module(package)
            yield Result(name, "pass", metadata.version(name))
        except ImportError as error:
            if is_absent(error, package):
                yield Result(name, "skip", "not installed", f"only {use} it: {install_command(package)}")
            else:
                found = f"installed, but cannot be imported: {error}".splitlines()[0]
                yield Result(name, "fail", found, f"install it anew: pip install --force-reinstall {name}")


def check_folders(folder: Path) -> Iterator[Result]:
    """Whether files can be written, and how much space is left: in `folder`, for temporary files, in the cache."""
    yield _check_folder("current folder", folder, "choose another folder for --out")
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError as error:
        yield Result("temporary folder", "fail", str(error), "set TMPDIR to a folder that can be written")
    else:
        yield _check_folder("temporary folder", temporary, "set TMPDIR to another folder")
    result = _check_folder("cache folder", find_cache_folder(), "set XDG_CACHE_HOME to another folder")
    if result.status == "fail":
        found = f"{result.found}; compiled kernels cannot be kept there"
        result = Result(result.name, "slow", found, result.advice, result.values)
    yield result


def _check_folder(name: str, folder: Path, advice: str) -> Result:
    """Write a small file in the folder, or in the nearest one above it that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Result(name, "fail", f"{folder} cannot be written: {error.strerror}", advice)
    free = shutil.disk_usage(existing).free
    values = {"folder": str(folder), "free_bytes": free}
    if free < _LEAST_BYTES:
        return Result(
            name, "fail", f"{folder}: only {free / 2**30:.2f} GiB are free", f"free space, or {advice}", values
        )
    return Result(name, "pass", f"{folder} can be written, {free / 2**30:.0f} GiB free", values=values)


def check_hub() -> Iterator[Result]:
    """Whether the Hugging Face hub answers. Only loading and uploading by name need it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Result("hub", "skip", "HF_HUB_OFFLINE is set: checkpoints are loaded from folders and the hub's cache")
        return
    from huggingface_hub import get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=5, follow_redirects=True)
    except Exception as error:
        found = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        advice = "needed only to load or upload checkpoints by name; set HF_HUB_OFFLINE=1 where there is no network"
        yield Result("hub", "fail", found, advice)
        return
    good = answer.status_code < 500
    found = f"{constants.ENDPOINT} answers ({answer.status_code})"
    yield Result("hub", "pass" if good else "fail", found, "" if good else "try again later")
