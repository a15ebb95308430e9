"""Memory that freed tensors leave behind, for processes that compute on a CPU."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_freed_memory() -> None:
    """Let the C library reuse the memory that large tensors free, and torch ask for huge pages for them.

    By default every tensor of more than a few MiB is new memory from the system, which must be cleared page by page
    and costs more than what is computed in it: a convolutional decoder takes a quarter less time this way. It changes
    the whole process, so only the command line calls it; call it yourself where the process is yours. It has no effect
    without Linux's C library.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, 2**30)
