"""Which of the fast CPU paths are in use on this machine, and why others are not."""

from __future__ import annotations

from nextscale.backends.cpu import products
from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.compilation import HEADS
from nextscale.backends.cpu.kernels.experts import RouterPanels

_BLOCKS = [("blocks", head) for head in HEADS]
_EXPERTS, _ROUTERS = ("experts", build.MAX_VECTORS), ("experts", RouterPanels.vectors)
FAMILIES = {
    "attention": _BLOCKS,
    "adaLN": _BLOCKS[-1:],
    "experts": [_EXPERTS],
    "slices": [_EXPERTS, _ROUTERS],
    "16-bit weights": [("linear", build.MAX_VECTORS)],
    "8-bit layers": [("int8", build.MAX_VECTORS)],
    "gradients": [("training", head) for head in HEADS],
}
"""What the compiled kernels compute -> the libraries that it needs: adaptive layer normalisation, the experts of a
mixture, dynamic experts, which are slices of one feed-forward, linear layers that a CPU computes in float32, what
those in 8 bits do beside their products, and the gradients of attention and tanh-GELU."""


def come_from_wheel(family: str) -> bool:
    """Whether the kernels of a family of `explain_kernels` are those of the installed wheel."""
    return family in FAMILIES and all(build.comes_from_wheel(*one) for one in FAMILIES[family])


def explain_kernels() -> dict[str, str | None]:
    """For each family of `FAMILIES`, and for packed products, None where it is in use here, else the reason.

    Builds what has not been built: some ten seconds at the first call on a machine.
    """
    missing = {
        family: next((reason for one in libraries if (reason := build.explain_missing(*one))), None)
        for family, libraries in FAMILIES.items()
    }
    return missing | {"packed products": None if products.has_onednn else "this torch has no oneDNN products here"}
