"""How many examples a process computes at once, and how many data workers it has: `micro_batch` and `workers` auto.

The memory that examples need is counted: the bytes that autograd keeps of two forward passes of few examples. A GPU
then tries the first step, before any weight has changed, and halves what it runs out of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.machine import count_cores, is_out_of_memory, measure_memory
from nextscale.common.precision import choose_training_dtype, lower_precision
from nextscale.common.rng import make_generator
from nextscale.config.training import TrainConfig
from nextscale.data.examples import Examples
from nextscale.training.engine.distributed import DistributedModel, get_own_part
from nextscale.training.engine.expert_parallel import find_mixtures
from nextscale.training.engine.task import Task

RESERVE = 0.1
"""Share of a device's memory that is left for what is not counted: kernels' buffers, fragments, other programs."""
_MOST_WORKERS = 8
"""On a GPU. More of them rarely help, and each holds a copy of what it reads."""
_GIB = 2**30


class SavedTensors:
    """The bytes of each storage that autograd keeps for the backward pass, without the weights of a module."""

    def __init__(self, module: nn.Module):
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.UntypedStorage] = []
        """So that no later storage gets the number of an earlier one."""
        self.times = 1
        """By how much the next storages count."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved in this context."""
        with torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor):
            yield

    def _record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.sizes.setdefault(storage._cdata, storage.nbytes() * self.times)
            self.alive.append(storage)
        return tensor.detach()  # an output that its own operation saves would keep itself alive

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this tensor, whatever keeps it."""
        self.sizes[tensor.untyped_storage()._cdata] = 0
        self.alive.append(tensor.untyped_storage())

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass."""

    constant: int
    """Whatever the number of examples: copies of the weights in 16 bits."""
    per_example: int

    @classmethod
    def from_passes(cls, few: int, more: int, examples: int) -> Activations:
        """From the bytes of a pass with so many examples and of one with one more."""
        per_example = max(more - few, 0)
        return cls(max(few - examples * per_example, 0), per_example)

    def count(self, examples: int) -> int:
        """Bytes of a pass with so many examples."""
        return self.constant + examples * self.per_example


def choose_divisor(count: int, most: float) -> int:
    """The largest divisor of `count` that is at most `most`, and at least 1."""
    return max((n for n in range(1, count + 1) if count % n == 0 and n <= most), default=1)


def choose_micro_batch(per_process: int, activations: Activations, free: float) -> int:
    """The largest divisor of a process's batch whose activations fit into `free` bytes; 1 where none does."""
    return choose_divisor(per_process, (free - activations.constant) / max(activations.per_example, 1))


def count_state_bytes(
    config: TrainConfig, trained: int, frozen: int = 0, divided: int = 0, processes: int = 1
) -> float:
    """Bytes that a process holds whatever the micro-batch: weights, gradients, two moments, averages, in float32.

    `trained`, `frozen`: numbers of parameters. `divided`: how many of the trained ones the processes share. DDP holds
    the gradients a second time, to send them.
    """
    copies = 4 + (1 if config.ema else 0)
    sent = 1 if processes > 1 and config.sharding != "full" else 0
    return 4 * (copies * divided / processes + (copies + sent) * (trained - divided) + frozen)


def resolve_auto(task: Task, config: TrainConfig, world: World, recorded: int | None) -> tuple[TrainConfig, str]:
    """The config with numbers in place of `micro_batch` auto and `workers` auto, and a line that names them.

    `recorded`: the micro-batch that a state of this run was computed with; 0: all at once; None: there is no state.
    The task must be on its device, and not yet wrapped. All processes must call it; they choose the same micro-batch.
    """
    per_process = sum(rows.stop - rows.start for rows in config.split_batch(world.size)[world.rank])
    said = []
    if config.micro_batch == "auto":
        if recorded is None:
            micro_batch, why = _fit_micro_batch(task, config, world, per_process)
        else:
            micro_batch, why = min(recorded or per_process, per_process), "as this run had so far"
        config = replace(config, micro_batch=micro_batch)
        said.append(f"{micro_batch} of {per_process} images at once (micro_batch auto: {why})")
        if micro_batch < per_process and task.micro_batch_matters:
            said.append(f"other micro-batches give other results: {task.micro_batch_matters}")
    if config.workers == "auto":
        workers = choose_workers(task.examples, world.device, _count_local(world))
        config = replace(config, workers=workers)
        said.append(f"{workers} data workers (workers auto)")
    return config, "; ".join(said)


def choose_workers(examples: Examples, device: torch.device, processes: int) -> int:
    """Data workers of each of the `processes` of this machine: none where no images are decoded.

    A core is left to each process. On a CPU the model computes on the others, so one worker is the most.
    """
    cores = count_cores() // processes
    return max(0, min(1 if device.type == "cpu" else _MOST_WORKERS, cores - 1)) if examples.decodes else 0


def _count_local(world: World) -> int:
    """Processes of the run on this machine, as torchrun says; else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def _fit_micro_batch(task: Task, config: TrainConfig, world: World, per_process: int) -> tuple[int, str]:
    """The micro-batch that fits into the memory of every process, and why it does."""
    memory = measure_memory(world.device)
    try:
        activations = measure_activations(task, config, world.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        activations = Activations(0, memory[1] if memory else 0)
    free, total = memory or (0, 0)
    if world.device.type == "cpu":
        free, total = (size // _count_local(world) for size in (free, total))
    left = free - RESERVE * total - _count_new_bytes(task, config, world)
    fits = choose_micro_batch(per_process, activations, left) if memory and activations else per_process
    micro_batch = int(world.gather(torch.tensor([fits])).min())
    if not memory or not activations:
        return micro_batch, "the memory is not known"
    needed, place = activations.count(micro_batch) / _GIB, f"{free / _GIB:.1f} GiB free"
    short = micro_batch == 1 and activations.count(1) > left
    return micro_batch, f"{'even so ' if short else ''}about {needed:.2f} GiB of activations, {place}"


def _count_new_bytes(task: Task, config: TrainConfig, world: World) -> float:
    """Bytes of what is not there before training: gradients, moments, averages; less what the processes share."""
    counts = [p.numel() for p in task.trained.parameters() if p.requires_grad]
    trained, divided = sum(counts), 0
    if world.size > 1 and config.sharding == "full":
        divided = trained
    elif world.size > 1 and config.sharding == "experts":
        divided = sum(p.numel() for m in find_mixtures(task, task.name).values() for p in m.parameters())
    return count_state_bytes(config, trained, 0, divided, world.size) - 4 * trained


def measure_activations(task: Task, config: TrainConfig, device: torch.device) -> Activations | None:
    """The bytes that training on an example keeps, from two passes; None where examples cannot be read.

    Leaves no trace in the task. Convolutions keep more of a single example than of one among others.
    """
    dtype, totals = choose_training_dtype(config.precision, device), list[int]()
    fewest = 1 if task.blocks() else 2
    for count in (fewest, fewest + 1):
        try:
            batch, noise = _fetch_inputs(task, config, count, device)
        except UserError:  # the first step says which examples cannot be read
            return None
        saved, inputs = SavedTensors(task), [0]
        hooks = [block.register_forward_pre_hook(partial(_count_input, inputs)) for block in task.blocks()]
        try:
            with saved.watch(), lower_precision(device, dtype):
                task(batch, noise, 0)
        finally:
            for hook in hooks:
                hook.remove()
            task.discard_step()
        total = saved.total
        if config.activation_checkpointing and hooks:
            total = total // len(hooks) + inputs[0]
        totals.append(total)
    return Activations.from_passes(totals[0], totals[1], fewest)


def _fetch_inputs(
    task: Task, config: TrainConfig, count: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """So many examples, the first ones again where there are fewer, with their random numbers, on a device."""
    batch = task.examples.fetch([i % len(task.examples) for i in range(count)], range(count))
    batch.pop("unreadable", None)
    noise = task.draw_noise(count, make_generator(config.seed, task.name, "memory"))
    noise.pop("length", None)  # of steps that leave out scales: all of them need the most memory
    return (
        {name: tensor.to(device) for name, tensor in batch.items()},
        {name: tensor.to(device) for name, tensor in noise.items()},
    )


def _count_input(sizes: list[int], block: nn.Module, arguments: tuple[Any, ...]) -> None:
    sizes[0] += arguments[0].nbytes


# ---- the first step, tried


def runs_out_with_an_error(device: torch.device) -> bool:
    """Whether the device raises an error, see `is_out_of_memory`; a CPU's process is killed instead."""
    return device.type != "cpu"


def try_micro_batch(
    model: DistributedModel, config: TrainConfig, optimizer: torch.optim.Optimizer, step: int
) -> TrainConfig:
    """The config with a micro-batch with which a step can be computed: halved, with a line, as often as necessary.

    Weights, states and random numbers stay as they are, so the run goes on as if it had begun with it. All processes
    must call it. UserError when one example is too much; and for models whose processes wait for each other inside a
    forward pass, when the micro-batch is.
    """
    assert isinstance(config.micro_batch, int), "resolve_auto has chosen it"
    world, per_process = model.world, config.batch_size // model.world.size
    waits = config.sharding != "none" or model.task.waits_in_forward
    micro_batch, meets = config.micro_batch, model.world.size > 1 and waits
    while True:
        fits = _try_step(model, config, optimizer, min(micro_batch, per_process), step)
        smaller = choose_divisor(per_process, micro_batch // 2)
        if not fits and (meets or micro_batch == 1):
            advice = f"give --train.micro-batch {smaller}" if micro_batch > 1 else "it takes a smaller model"
            raise UserError(f"{world.device} ran out of memory with {micro_batch} images at once: {advice}")
        if not any(world.any(not fits)):
            return replace(config, micro_batch=micro_batch)
        if world.main:
            tqdm.write(f"memory: {micro_batch} images at once are too many for {world.device}; trying {smaller}")
        micro_batch = smaller


def _try_step(
    model: DistributedModel, config: TrainConfig, optimizer: torch.optim.Optimizer, count: int, step: int
) -> bool:
    """Whether two micro-batches of so many examples can be computed beside the moments that the optimizer will hold.

    Gradients are not summed over the processes, and are forgotten.
    """
    task, device = model.task, model.world.device
    try:
        trained = [p for p in task.trained.parameters() if p.requires_grad]
        missing = 0 if optimizer.state else 2 * sum(get_own_part(p).nbytes for p in trained)
        moments = torch.empty(missing, dtype=torch.uint8, device=device)
        for _ in range(2):  # the second is computed beside the gradients of the first
            batch, noise = _fetch_inputs(task, config, count, device)
            with model.accumulate(last=False):
                model.forward(batch, noise, step)[0].backward()
        del moments
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        optimizer.zero_grad(set_to_none=True)
        task.discard_step()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()
