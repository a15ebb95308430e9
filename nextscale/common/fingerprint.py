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


def fingerprint_files(files: Iterable[Path], root: Path) -> dict[str, Any]:
    """Number, bytes and two digests of files, without reading them: {"files", "bytes", "names", "modified"}.

    "names" covers the paths below `root` and the sizes, "modified" the modification times, so that a mismatch can say
    which of them differ. The order of the files does not matter. Raises UserError when a file is absent.
    """
    names, times, count, total = hashlib.sha256(), hashlib.sha256(), 0, 0
    prefix = f"{root}/"
    for file in sorted(map(str, files)):
        try:
            stat = os.stat(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        names.update(f"{file.removeprefix(prefix)}\0{stat.st_size}\0".encode("utf-8", "surrogateescape"))
        times.update(f"{stat.st_mtime_ns}\0".encode())
        count, total = count + 1, total + stat.st_size
    return {"files": count, "bytes": total, "names": names.hexdigest()[:32], "modified": times.hexdigest()[:32]}
