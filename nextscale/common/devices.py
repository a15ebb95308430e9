"""Find devices by name; copy to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.common.errors import UserError


def find_device(name: torch.device | str = "auto") -> torch.device:
    """The named device; auto: cuda where there is one, else mps, else cpu.

    UserError when torch does not know it or cannot reach it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith(("Expected one of", "Invalid device string", "Device string")):
            reason = "there is no such device; use auto, cpu, cuda, cuda:1 or mps"
        elif reason.startswith("Could not run"):
            reason = "this torch was built without it, or the machine has none; use auto or cpu"
        raise UserError(f"device '{name}' cannot be used here: {reason}") from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given. A CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. The host does not wait for a copy from its memory to a GPU: the source is pinned."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def create_embedding(count: int, width: int) -> nn.Embedding:
    """nn.Embedding(count, width). On the meta device no values are drawn, for which torch would load its compiler."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
