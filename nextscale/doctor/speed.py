"""Checks of the device: its memory and threads, which types are fast on it, and which kernels are in use."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from nextscale.common.devices import synchronize
from nextscale.common.machine import count_cores, describe_machine
from nextscale.common.precision import get_name
from nextscale.config.transformer import TransformerConfig
from nextscale.doctor.models import create_model
from nextscale.doctor.result import Result, Status
from nextscale.pipeline import Pipeline

_TIMED = TransformerConfig(depth=4, width=512, heads=8)
_SCALES = "1,2,3,4,6,8"
_ROUNDS, _BATCH = 5, 8
_SLOWER = 1.1
"""How much slower than float32 a type may be before that is a fault: the noise of five rounds."""


def check_device(device: torch.device) -> Iterator[Result]:
    """The device, its memory and, for a CPU, its threads."""
    machine = describe_machine(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        count = torch.cuda.device_count()
        found = f"{machine['device']}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {count} visible"
        yield Result("device", "pass", found, values={**machine, "free_bytes": free, "total_bytes": total})
        return
    yield Result("device", "pass", machine["device"], values=machine)
    if device.type != "cpu":
        return
    cores = count_cores()
    threads = torch.get_num_threads()
    found = f"{threads} threads on {cores} cores that this process may use"
    advice = ""
    if threads > cores:
        advice = f"threads wait for one another: set OMP_NUM_THREADS={cores} or less"
    elif threads == 1 < cores:
        advice = f"set OMP_NUM_THREADS={cores} to use them, unless several processes share them"
    yield Result("threads", "slow" if advice else "pass", found, advice)


def check_kernels(device: torch.device) -> Iterator[Result]:
    """The compiled kernels of a CPU: in use, or why not."""
    if device.type != "cpu":
        return
    from nextscale.backends.cpu.kernels.status import come_from_wheel, explain_kernels

    for family, reason in explain_kernels().items():
        status: Status = "slow" if reason else "pass"
        advice = "results are right without it; install gcc or clang" if reason and "compiler" in reason else ""
        use = "in use, from the wheel" if come_from_wheel(family) else "in use"
        yield Result(f"kernels, {family}", status, f"not in use: {reason}" if reason else use, advice)


def check_types(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Result]:
    """The time of sampling in each type over that of float32, in alternating rounds. None may be slower."""
    models = {dtype: create_model(_TIMED, "auto", device, dtype, _SCALES) for dtype in (torch.float32, *dtypes)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in models}
    for turn in range(_ROUNDS + 1):
        for dtype, model in models.items():
            spent = _time_sampling(model)
            if turn:  # the first round packs weights and builds kernels
                seconds[dtype].append(spent)
    base = min(seconds[torch.float32])
    found = f"{base / _BATCH * 1000:.1f} ms an image (depth {_TIMED.depth}, width {_TIMED.width}, batch {_BATCH})"
    yield Result("float32", "pass", found, values={"seconds": base})
    for dtype in dtypes:
        name, ratio = get_name(dtype), base / min(seconds[dtype])
        slow = ratio < 1 / _SLOWER
        advice = f"do not ask for {name} here; --dtype auto chooses the fastest type" if slow else ""
        found = f"{ratio:.2f} times as fast as float32"
        yield Result(name, "slow" if slow else "pass", found, advice, {"times_as_fast": ratio})


def _time_sampling(model: Pipeline) -> float:
    """Seconds in which a batch is sampled."""
    synchronize(model.device)
    start = time.perf_counter()
    model.sample([0] * _BATCH, cfg=0.0, batch_size=_BATCH)
    synchronize(model.device)
    return time.perf_counter() - start
