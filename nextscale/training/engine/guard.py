"""What stops a run before it does harm: values that are not finite, and signals that ask for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.data.examples import Batch
from nextscale.training.engine.task import Task


def explain_non_finite(task: Task, batch: Batch, noise: dict[str, Tensor], step: int) -> str:
    """Where values stop being finite: the scale whose loss it is, the first layer that gives them, or the gradient."""
    layer: list[str] = []

    def look(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not layer and isinstance(output, Tensor) and not torch.isfinite(output).all():
                layer.append(name)

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in task.trained.named_modules() if n]
    try:
        with torch.no_grad():
            loss, scalars = task(batch, noise, step)
    finally:
        for handle in hooks:
            handle.remove()
    if torch.isfinite(loss):
        broken = [n for n, p in task.trained.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return f"the gradient of {broken[0]} and {len(broken) - 1} more parameters is not" if broken else ""
    scale = task.scales_at_fault(scalars)
    parts = ([f"at {scale}"] if scale else []) + ([f"the first layer at fault is {layer[0]}"] if layer else [])
    return "; ".join(parts)


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield event
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
