"""All checks of `nextscale doctor`, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nextscale.doctor.environment import check_extras, check_folders, check_hub, check_versions
from nextscale.doctor.result import Check, Result, run_check


def diagnose(device: str = "auto") -> Iterator[Result]:
    """The results of all checks, each as soon as it is known. Without torch only those that need none.

    `device`: auto, cpu, cuda, cuda:1, ...
    """
    around: dict[str, Check] = {
        "versions": check_versions,
        "optional packages": check_extras,
        "folders": lambda: check_folders(Path.cwd()),
        "hub": check_hub,
    }
    failed = False
    for name, check in around.items():
        for result in run_check(name, check):
            failed |= result.status == "fail" and result.name in ("packages", "torch", "versions")
            yield result
    if failed:
        yield Result("device", "skip", "not checked: torch or a package that nextscale needs is missing")
        return
    for name, check in list_device_checks(device).items():
        yield from run_check(name, check)


def list_device_checks(device: str) -> dict[str, Check]:
    """The checks that compute, on this device."""
    import torch

    from nextscale.common.devices import find_device
    from nextscale.common.precision import is_fast
    from nextscale.doctor import agreement, processes, speed

    chosen = find_device(device)
    dtypes = [torch.bfloat16] if chosen.type == "cpu" else [torch.bfloat16, torch.float16]
    dtypes += [torch.int8] if is_fast(torch.int8, chosen.type) else []
    return {
        "device": lambda: speed.check_device(chosen),
        "kernels": lambda: speed.check_kernels(chosen),
        "types": lambda: speed.check_types(chosen, dtypes),
        "families": lambda: agreement.check_families(chosen, dtypes),
        "batches": lambda: agreement.check_batches(chosen),
        "capture": lambda: agreement.check_capture(chosen),
        "processes": lambda: processes.check_processes(chosen),
    }
