"""Why a run stops before its last step: non-finite values, stop signals, dead data workers, unreadable examples."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.data.examples import Batch
from nextscale.training.engine.distributed import DistributedModel, get_own_part
from nextscale.training.engine.state import StateFiles
from nextscale.training.engine.task import MicroBatch, Task


@dataclass
class Interrupted(Exception):
    """Training was asked to stop; the state is saved."""

    task: str
    step: int
    steps: int
    exit_status = 130


class NonFiniteError(UserError):
    """A training came to values that are not finite."""


def is_finite(loss: Tensor, gradient_norm: Tensor, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step may be taken. With float16 the scaler itself skips steps whose gradient overflows."""
    finite = loss.isfinite()
    return bool(finite if scaler.is_enabled() else finite & gradient_norm.isfinite())  # waits once


def raise_non_finite(
    model: DistributedModel, micro_batch: MicroBatch, loss: Tensor, gradient_norm: Tensor, step: int, files: StateFiles
) -> None:
    """Raise the error of a step with non-finite values, which names where they arise and the last state on disk.

    All processes must call it. It is that of the first process whose own loss is not finite; the gradient's norm, which
    all processes share, tells nothing about where.
    """
    with model.autocast():
        reason = explain_non_finite(model.task, micro_batch.batch, micro_batch.noise, step)
    saved = files.list_steps()
    kept = f"the checkpoint of step {saved[0]} is kept" if saved else "no checkpoint was saved yet"
    error = NonFiniteError(
        f"training the {model.task.name}: loss {loss.item()} and gradient norm {gradient_norm.item()} "
        f"at step {step} are not both finite{'; ' if reason else ''}{reason}; {kept}; try a lower learning rate"
    )
    world = model.world
    culprit = world.first(not bool(loss.isfinite())) or 0
    world.raise_first(error if world.rank == culprit else None)


def explain_non_finite(task: Task, batch: Batch, noise: dict[str, Tensor], step: int) -> str:
    """Where values become non-finite: the scale whose loss it is and the first layer, or else the gradient.

    A forward pass as in training, with gradients, which some losses compute. All processes must call it.
    """
    layers: list[str] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not layers and isinstance(output, Tensor) and not torch.isfinite(output).all():
                layers.append(name)

        return hook

    hooks = [m.register_forward_hook(make_hook(n)) for n, m in task.trained.named_modules() if n]
    try:
        loss, scalars = task(batch, noise, step)
    finally:
        for handle in hooks:
            handle.remove()
    if torch.isfinite(loss):
        gradients = {n: get_own_part(p.grad) for n, p in task.trained.named_parameters() if p.grad is not None}
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        return f"the gradient of {broken[0]} and {len(broken) - 1} more parameters is not" if broken else ""
    scale = task.describe_faulty_scales(scalars)
    reasons = ([f"at {scale}"] if scale else []) + ([f"the first layer at fault is {layers[0]}"] if layers else [])
    return "; ".join(reasons)


def report_missing_gradients(model: DistributedModel, step: int) -> None:
    """In step 0, name the trained parameters that have no gradient in any process, in one line.

    To be called after the backward passes, by all processes. A gradient that is exactly zero counts as none.
    """
    if step:
        return
    task, world = model.task, model.world
    trained = {name: p for name, p in task.trained.named_parameters() if p.requires_grad}
    learns_P = world.sum(torch.stack([_has_gradient(p) for p in trained.values()]).to(world.device)) > 0
    idle = {name for name, learns in zip(trained, learns_P.tolist(), strict=True) if not learns}
    idle = {name for name in idle if task.explain_missing_gradient(name) != ""}
    if not idle or not world.main:
        return
    names = []
    for name in _group_parameters(task.trained, trained, idle):
        reason = task.explain_missing_gradient(name)
        names.append(f"{name} ({reason})" if reason else name)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    tqdm.write(
        f"note: after the first step, {len(idle)} of {len(trained)} trained parameters of the {task.name} have no "
        f"gradient and do not learn: {', '.join(names[:8])}{more}"
    )


def _has_gradient(parameter: Tensor) -> Tensor:
    """1 where this process's part of the parameter has a gradient that is not zero, else 0; a float32 scalar."""
    gradient = parameter.grad
    return torch.zeros((), device=parameter.device) if gradient is None else get_own_part(gradient).any().float()


def _group_parameters(module: nn.Module, trained: Iterable[str], idle: set[str], prefix: str = "") -> list[str]:
    """`idle`, names of some of the `trained` parameters, where a module stands for its parameters if all are idle."""
    inside = [name for name in trained if name.startswith(prefix)]
    if not idle.intersection(inside):
        return []
    if prefix and idle.issuperset(inside):
        return [prefix.rstrip(".")]
    names = [name for name in inside if name in idle and "." not in name[len(prefix) :]]
    for name, child in module.named_children():
        names += _group_parameters(child, inside, idle, f"{prefix}{name}.")
    return names


@contextmanager
def catch_stop_signals(world: World) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield event
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request_stop(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not world.has_failed:
            tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    for number in previous:
        signal.signal(number, request_stop)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def describe_worker_death(error: Exception, workers: int) -> str:
    """How a data worker died, or an empty text when the error is about something else.

    torch raises a RuntimeError of no type of its own. A death while a batch is handed over breaks the connection.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return text.splitlines()[0]
    if workers and not isinstance(error, RuntimeError):
        return f"a DataLoader worker died while it handed over a batch ({type(error).__name__})"
    return ""
