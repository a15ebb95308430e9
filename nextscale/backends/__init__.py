"""What makes a machine fast. Models are plain PyTorch; `optimize` swaps their modules for fast twins.

Nothing here is imported before it is used: `keep_freed_memory` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["keep_freed_memory", "optimize"]

if TYPE_CHECKING:
    from nextscale.backends.cpu.memory import keep_freed_memory
    from nextscale.backends.twins import optimize


def __getattr__(name: str) -> Any:
    if name == "optimize":
        from nextscale.backends.twins import optimize

        return optimize
    if name == "keep_freed_memory":
        from nextscale.backends.cpu.memory import keep_freed_memory

        return keep_freed_memory
    raise AttributeError(f"nextscale.backends has no {name}")
