"""One checksum for tensors and settings that belong together: of tokenizers, feature networks, routers, runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

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
