"""The machine: its name for a figure that was measured on it, its cores and its memory. Loads torch when it is used."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nextscale

if TYPE_CHECKING:
    import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions and today's date, as JSON values."""
    import torch

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


def measure_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of the device's memory; of a CPU what the system and its limits leave; None if not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return _measure_ram() if device.type == "cpu" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: torch has a type for CUDA alone, and messages for CPUs and MPS."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return True
    # MPS has a limit for each buffer, too
    messages = ("DefaultCPUAllocator", "MPS backend out of memory", "Invalid buffer size")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def _measure_ram() -> tuple[int, int] | None:
    """(free, total) bytes of this machine, or of the container that limits the process (cgroup version 2)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, KeyError, ValueError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
        return total // 2, total  # such systems do not tell what is free
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # "max": no limit
        return free, total
    return min(free, limit - used), min(total, limit)


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
