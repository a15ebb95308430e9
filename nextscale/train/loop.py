"""The training loop, for every task.

All randomness of a step is folded from (seed, task, step), so a run that was interrupted and resumed ends with the same
weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.config import to_dict
from nextscale.errors import UserError
from nextscale.rng import generator
from nextscale.train.config import TrainConfig
from nextscale.train.log import JsonLog, Stopwatch
from nextscale.train.state import TrainState, load_state, save_state


class Task(Protocol):
    """What is trained: a module and its loss on some examples."""

    name: str
    examples: int

    module: nn.Module
    """Its parameters are trained; its whole state is saved."""

    def loss(self, index_B: Tensor, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the examples of these indices, and scalars worth logging."""

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """What learns by other means than the gradient."""


@dataclass
class Interrupted(Exception):
    """Training was asked to stop; the state is saved."""

    task: str
    step: int
    steps: int


def fit(
    task: Task, config: TrainConfig, folder: Path, evaluate: Callable[[int], dict[str, float]] | None = None
) -> None:
    """Train `task` for `config.steps` steps, from where a state in `folder` left off.

    `evaluate` is called with the number of steps done whenever a checkpoint was saved; what it measures is logged.

    Progress goes to the screen and to `folder`/log.jsonl, one line per logged step. Ctrl-C or SIGTERM ends the step at
    hand, saves, and raises Interrupted; a second Ctrl-C does not wait. Raises UserError when the state in `folder`
    belongs to another config, or when the loss is not finite.
    """
    optimizer = adamw(task.module, config)
    path = folder / "training" / f"{task.name}.pt"
    state = load_state(path, task.module, optimizer, to_dict(config)) if path.exists() else TrainState(0)
    log = JsonLog(folder / "log.jsonl", task.name, from_step=state.step)
    speed = Stopwatch()
    task.module.train()
    often = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
    bar = tqdm(total=config.steps, initial=state.step, desc=f"training the {task.name}", unit="step", mininterval=often)
    with bar, stop_requested() as stopping:
        for step in range(state.step, config.steps):
            # ---- one step
            index_B = batch_indices(task.examples, config, task.name, step)
            set_learning_rate(optimizer, config, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss, scalars = task.loss(index_B, step, generator(config.seed, task.name, "step", step))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(task.module.parameters(), config.clip or math.inf)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise UserError(
                    f"training the {task.name}: loss {loss.item()} and gradient norm {norm.item()} at step {step} "
                    f"are not both finite; the last good checkpoint is {path}; try a lower learning rate"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            task.after_step(step, generator(config.seed, task.name, "after", step))
            # ---- then the rare events
            done = step + 1
            speed.count += len(index_B)
            if done % config.log_every == 0 or done == config.steps:
                values = {"loss": loss.item(), **{n: s.item() for n, s in scalars.items()}}
                log.write(done, {**values, "images_per_s": round(speed.read(), 1)})
                bar.set_postfix({n: f"{v:.3f}" for n, v in values.items()}, refresh=False)
            bar.update()
            if stopping.is_set() or done % config.save_every == 0 or done == config.steps:
                with speed.paused():
                    save_state(path, TrainState(done), task.module, optimizer, to_dict(config))
                    if evaluate is not None and not stopping.is_set():
                        task.module.eval()
                        log.write(done, evaluate(done))
                        task.module.train()
            if stopping.is_set():
                raise Interrupted(task.name, done, config.steps)
    task.module.eval()


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with VAR's groups: weight matrices, convolutions and class embeddings decay; nothing else does."""
    free = ("pos_start", "pos_embed", "level_embed", "offset", "log_scale")
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or any(part in free for part in name.split("."))
        (others if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then half a cosine down to the final learning rate."""
    if step < config.warmup_steps:
        rate = config.learning_rate * (step + 1) / config.warmup_steps
    else:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        span = config.learning_rate - config.final_learning_rate
        rate = config.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate


def batch_indices(examples: int, config: TrainConfig, name: str, step: int) -> Tensor:
    """Which examples step `step` sees: consecutive places in an endless row of permutations, one per epoch."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = sorted({place // examples for place in places})
    orders = {e: torch.randperm(examples, generator=generator(config.seed, name, "order", e)) for e in epochs}
    return torch.stack([orders[place // examples][place % examples] for place in places])


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
