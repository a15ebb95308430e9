"""Random generators that are derived from a seed and a purpose, never from earlier draws.

`make_generator(seed, "order", epoch)` gives the same stream at every call. So a resumed run needs no stored generator
state, and the noise of an image does not depend on the other images of its batch.
"""

from __future__ import annotations

import hashlib

import torch


def fold_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose under `seed`: equal arguments give equal numbers on every machine."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose under `seed`."""
    return torch.Generator().manual_seed(fold_seed(seed, *purpose))
