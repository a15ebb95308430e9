"""Modules that share their parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def share_parameters(module: M, **children: nn.Module) -> M:
    """A second module of the same class with the same parameters, buffers, hooks and children, but for `children`.

    Attributes that are set on one of them are not set on the other. A module that FSDP2 has sharded works, too: its
    class makes no copies, so the object is made without its constructor.
    """
    view: M = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    if children:
        view.__dict__["_modules"] = {**module._modules, **children}
    return view
