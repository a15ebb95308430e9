"""Randomness derived from a seed and from what it is for, never from what happened before.

`make_generator(seed, "order", epoch)` gives the same stream whenever it is asked for, so a resumed run needs no stored
generator state, and an image's noise does not depend on who shares its batch.
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
