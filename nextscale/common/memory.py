"""Refuse what cannot fit into this machine's memory before it is allocated."""

from __future__ import annotations

import os

from nextscale.common.errors import UserError


def check_memory(size: int, what: str) -> None:
    """Raise UserError when `what` needs more bytes than this machine has; where that is unknown all passes."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if size > total > 0:
        raise UserError(f"{what} would need {size / 2**30:,.0f} GiB, and this machine has {total / 2**30:,.0f}")
