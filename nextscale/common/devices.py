"""The device that work is done on, and what a figure was measured on."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nextscale
from nextscale.common.errors import UserError


def find_device(name: torch.device | str) -> torch.device:
    """The named device; UserError when torch does not know it or cannot reach it here."""
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error


def find_dtype(name: torch.dtype | str) -> torch.dtype:
    """The floating-point dtype of this name; UserError for anything else."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"'{name}' is no floating-point dtype; use float32, bfloat16 or float16")
    return dtype


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions and today's date, as JSON values."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nextscale": nextscale.__version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    """The CPU's name where the system tells it, with family and model, which alone tell some clouds' CPUs apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    parts = [facts.get("model name", platform.machine())]
    parts += [f"{n} {facts[k]}" for n, k in (("family", "cpu family"), ("model", "model")) if k in facts]
    return ", ".join(parts)


def create_embedding(count: int, width: int) -> nn.Embedding:
    """nn.Embedding(count, width). On the meta device no values are drawn, for which torch would load its compiler."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
