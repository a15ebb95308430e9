"""Description of the machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

import nextscale


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions and today's date, as JSON values."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _read_processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nextscale": nextscale.__version__,
        "date": date.today().isoformat(),
    }


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_processor() -> str:
    """Name of the CPU with its family and model, which distinguish CPUs that cloud machines name alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    parts = [facts.get("model name", platform.machine())]
    parts += [f"{n} {facts[k]}" for n, k in (("family", "cpu family"), ("model", "model")) if k in facts]
    return ", ".join(parts)
