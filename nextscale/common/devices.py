"""Find devices and dtypes by name."""

from __future__ import annotations

import torch
from torch import nn

from nextscale.common.errors import UserError


def find_device(name: torch.device | str) -> torch.device:
    """The named device; UserError when torch does not know it or cannot reach it here."""
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):
            reason = "there is no such kind; use cpu, cuda or cuda:1"
        raise UserError(f"device '{name}' cannot be used here: {reason}") from error


def find_dtype(name: torch.dtype | str) -> torch.dtype:
    """The floating-point dtype of this name; UserError for anything else."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"'{name}' is no floating-point dtype; use float32, bfloat16 or float16")
    return dtype


def create_embedding(count: int, width: int) -> nn.Embedding:
    """nn.Embedding(count, width). On the meta device no values are drawn, for which torch would load its compiler."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
