"""One optimizer step: portions of the batch, forward and backward, clipping, update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.training import TrainConfig, learning_rate, weight_decay
from nextscale.data.examples import Batch, BatchDataset, load_batches
from nextscale.training.engine.guard import explain_non_finite
from nextscale.training.engine.log import Values
from nextscale.training.engine.parallel import Ema, Laid, by_kind
from nextscale.training.engine.state import Learner
from nextscale.training.engine.task import Task

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Does the steps of one task on this process."""

    def __init__(self, task: Task, config: TrainConfig, world: World):
        self.task, self.config, self.world = task, config, world
        self.steps, self.warmup = config.schedule_steps(len(task.examples))
        self.slices = config.shares(world.size)[world.rank]
        self.laid = Laid(task, config, world)
        self.learner = Learner(
            task.trained,
            adamw(task.trained, config),
            torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
            Ema(task.trained, config.ema) if config.ema else None,
        )
        self.rate = config.learning_rate
        self.unreadable: dict[str, None] = dict.fromkeys(task.examples.skipped)
        self._sums: dict[str, Tensor] = {}
        self._norm = torch.zeros(())
        self._noise: dict[str, Tensor] = {}
        self._batch: Batch = {}

    def portions(self) -> Iterator[Batch]:
        """The batches of this process from the learner's step on, read ahead by the workers."""
        size = self.config.batch_size
        spans = (
            (step * size + part.start, step * size + part.stop)
            for step in range(self.learner.step, self.steps)
            for part in self.slices
        )
        places = BatchDataset(self.task.examples, self.config.seed, self.task.name)
        reader = load_batches(places, spans, self.config.workers, pin=self.world.device.type == "cuda")
        for batch in reader:
            self.unreadable.update(dict.fromkeys(batch.pop("unreadable", ())))
            yield {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}

    def gradients(self, portions: Iterator[Batch]) -> bool:
        """Forward and backward of one step; whether loss and gradient are finite."""
        config, step, learner = self.config, self.learner.step, self.learner
        noise = self.task.noise(config.batch_size, make_generator(config.seed, self.task.name, "step", step))
        own = config.batch_size // self.world.size
        self._sums = {}
        for part in self.slices:
            self._batch = next(portions)
            self._noise = {name: rows[part].to(self.world.device) for name, rows in noise.items()}
            share = (part.stop - part.start) / own
            with self.laid.portion(last=part is self.slices[-1]):
                with self.autocast():
                    loss, scalars = self.laid.module(self._batch, self._noise, step)
                learner.scaler.scale(loss * share).backward()
            for name, value in {"loss": loss.detach(), **scalars}.items():
                self._sums[name] = self._sums.get(name, 0) + value * share
        learner.scaler.unscale_(learner.optimizer)
        self._norm = self.laid.norm()
        finite = torch.isfinite(self._sums["loss"])
        if not learner.scaler.is_enabled():  # which itself skips steps whose gradient overflows
            finite = finite & torch.isfinite(self._norm)
        return bool(finite)

    def autocast(self) -> torch.autocast:
        """The context that lower precision needs."""
        dtype = _DTYPES.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def update(self) -> None:
        """Change the weights."""
        config, learner, step = self.config, self.learner, self.learner.step
        self.rate = learning_rate(config, step, self.steps, self.warmup)
        for group in learner.optimizer.param_groups:
            group["lr"] = self.rate
            group["weight_decay"] = weight_decay(config, step, self.steps) if group["decayed"] else 0.0
        if config.clip:
            self.laid.clip(self._norm, config.clip)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(step, make_generator(config.seed, self.task.name, "after", step), self.world)
        if learner.ema:
            learner.ema.update()
        learner.step = step + 1

    def values(self) -> Values:
        """Loss and scalars of the last step over all processes."""
        mean = {name: self.world.sum(value.clone()) / self.world.size for name, value in self._sums.items()}
        return {n: v.tolist() for n, v in mean.items()} | {"gradient_norm": self._norm.item()}

    def complaint(self, last_good: int | None) -> UserError:
        """What is not finite in the step at hand."""
        task, step = self.task, self.learner.step
        with self.autocast():
            where = explain_non_finite(task, self._batch, self._noise, step)
        kept = "no checkpoint was saved yet" if last_good is None else f"the checkpoint of step {last_good} is kept"
        return UserError(
            f"training the {task.name}: loss {self._sums['loss'].item()} and gradient norm {self._norm.item()} "
            f"at step {step} are not both finite{'; ' if where else ''}{where}; {kept}; try a lower learning rate"
        )


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with VAR's groups: weight matrices, convolutions and class embeddings decay; nothing else does."""
    in_experts = ("bias", "scale_embed", "constant")  # there they are matrices: a row for each expert or scale
    free = ("pos_start", "pos_embed", "level_embed", "offset", "log_scale", *in_experts)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or any(part in free for part in name.split("."))
        (others if spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "decayed": True},
        {"params": others, "weight_decay": 0.0, "decayed": False},
    ]
    mixed = len(by_kind(list(module.parameters()))) > 1
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        foreach=False if mixed else None,  # which would put whole and divided parameters in one list
    )
