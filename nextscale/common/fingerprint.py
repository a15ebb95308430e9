"""Fingerprints of what work is made of: tensors with their settings, and files.

Whatever is stored to be used again (a cache, features, statistics, a stage, a run) records the fingerprints of its
ingredients beside it, and is used only where they are equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def compute_fingerprint(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """SHA-256, 64 hex digits, of a text and of named tensors in the order of their names.

    Tensors count with their names and their values in float32, so the digest does not depend on the stored dtype where
    a cast is exact. Files hold such digests: the order and the form of what is hashed must not change.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().flatten().numpy().data)
    return digest.hexdigest()


def fingerprint_weights(tensors: Mapping[str, Tensor], where: str = "the tokenizer") -> dict[str, Any]:
    """`compute_fingerprint` of weights as an input, see `nextscale.common.inputs`."""
    return {"where": where, "weights": compute_fingerprint(tensors)}


CONTENT_LIMIT = 2**26
"""Bytes of a file up to which `fingerprint_path` reads its content."""


def fingerprint_bytes(content: bytes) -> str:
    """SHA-256 of bytes, 32 hex digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def fingerprint_path(path: Path | str) -> dict[str, Any]:
    """What tells whether a file, or the config.json and the weights of a folder, changed; with "where", the path.

    The content counts of files up to 64 MiB and of weights whose digests are in config.json; of others the size and
    the modification time. A name that is no path (of a repository on the hub, "digits") stands for itself.
    """
    path = Path(path)
    where, config = {"where": str(path)}, path / "config.json"
    if path.is_dir():
        weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
        files = fingerprint_files(weights, path)
        if not config.is_file():
            return where | files
        content = config.read_bytes()
        if b'"digests"' in content:
            del files["modified"]
        return where | files | {"content": fingerprint_bytes(content)}
    if not path.is_file():
        return where
    size = path.stat().st_size
    if size <= CONTENT_LIMIT:
        return where | {"bytes": size, "content": fingerprint_bytes(path.read_bytes())}
    return where | fingerprint_files([path], path)


def fingerprint_files(files: Iterable[Path], root: Path) -> dict[str, Any]:
    """Number, bytes and two digests of files, without reading them: {"files", "bytes", "names", "modified"}.

    "names" covers the paths below `root` (of `root` itself, its name) and the sizes, "modified" the modification times,
    so that a mismatch can say which of them differ. The order of the files does not matter. Raises UserError when a
    file is absent.
    """
    names, times, count, total = hashlib.sha256(), hashlib.sha256(), 0, 0
    whole, prefix = str(root), f"{root}/"
    for file in sorted(map(str, files)):
        try:
            stat = os.stat(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        name = os.path.basename(file) if file == whole else file.removeprefix(prefix)
        names.update(f"{name}\0{stat.st_size}\0".encode("utf-8", "surrogateescape"))
        times.update(f"{stat.st_mtime_ns}\0".encode())
        count, total = count + 1, total + stat.st_size
    return {"files": count, "bytes": total, "names": names.hexdigest()[:32], "modified": times.hexdigest()[:32]}
