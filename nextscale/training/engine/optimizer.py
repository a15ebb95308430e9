"""AdamW with VAR's parameter groups, its schedules, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nextscale.config.training import TrainConfig
from nextscale.training.engine.distributed import gather_tensor, separate_sharded, shard_like

_NOT_DECAYED = ("pos_start", "pos_embed", "level_embed", "router_scales", "offset", "log_scale")
_NOT_DECAYED_IN_EXPERTS = ("bias", "scale_embed", "constant")  # matrices there: a row for each expert or scale


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with two groups: weight matrices, convolutions and class embeddings decay; all else does not."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = any(part in (*_NOT_DECAYED, *_NOT_DECAYED_IN_EXPERTS) for part in name.split("."))
        (not_decayed if parameter.ndim < 2 or exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "decayed": True},
        {"params": not_decayed, "weight_decay": 0.0, "decayed": False},
    ]
    mixed = len(separate_sharded(list(module.parameters()))) > 1
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        foreach=False if mixed else None,  # foreach takes no list with both sharded and other parameters
    )


def set_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """Set learning rate and weight decay of this step; return the learning rate."""
    rate = compute_learning_rate(config, step, steps, warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = compute_weight_decay(config, step, steps) if group["decayed"] else 0.0
    return rate


def compute_learning_rate(config: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """Learning rate of a step: linear warm-up, then the schedule, which reaches its end at the last step."""
    peak, final = config.learning_rate, config.final_learning_rate
    if step < warmup:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if config.schedule == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
    return peak if progress < config.flat else final + (peak - final) * (1 - progress) / (1 - config.flat)


def compute_weight_decay(config: TrainConfig, step: int, steps: int) -> float:
    """Weight decay of a step: constant, or along half a cosine to its final value."""
    if config.final_weight_decay is None:
        return config.weight_decay
    cosine = (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
    return config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * cosine


class Ema:
    """An exponential moving average of a module's trained parameters."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters as they are now."""
        parameters: list[Tensor] = list(self.parameters.values())
        groups = zip(separate_sharded(list(self.averages.values())), separate_sharded(parameters), strict=True)
        for averages, current in groups:
            torch._foreach_lerp_(averages, current, 1 - self.decay)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Replace the parameters by their averages inside this context."""
        current = {n: p.detach().clone() for n, p in self.parameters.items()}
        self._write_parameters(self.averages)
        try:
            yield
        finally:
            self._write_parameters(current)

    def write(self) -> None:
        """Replace the parameters by their averages for good."""
        self._write_parameters(self.averages)

    @torch.no_grad()
    def _write_parameters(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages on the CPU, gathered from all processes. All of them must call it."""
        return {name: gather_tensor(tensor).cpu() for name, tensor in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averages that `state_dict` returned."""
        for name, tensor in self.averages.items():
            tensor.copy_(shard_like(tensor, state[name].to(tensor.device)))
