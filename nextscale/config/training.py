"""Settings of training. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class TrainConfig:
    """Training of one model: AdamW, a linear warm-up, then a decay to the final learning rate."""

    steps: int = 1000
    """Optimizer steps in all."""
    epochs: float = 0.0
    """Passes over the training examples, instead of steps; 0 = use `steps`."""
    batch_size: int = 64
    """Examples per optimizer step, over all processes."""
    micro_batch: int = 0
    """Examples per forward pass and process: gradients of several passes are accumulated to batch_size. 0 = all."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up: half a cosine, or flat for a while and then a straight line (VAR's recipe)."""
    flat: float = 0.05
    """Linear schedule: share of the steps after the warm-up at the full learning rate."""
    warmup_steps: int = 50
    warmup_epochs: float = 0.0
    """Warm-up in epochs, instead of warmup_steps, when above 0."""
    warmup_start: float = 0.005
    """Share of the learning rate that the warm-up starts from."""
    weight_decay: float = 0.05
    """Not applied to biases, norms, and position and level embeddings."""
    final_weight_decay: float | None = None
    """Reached along half a cosine; none = constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 2.0
    """Largest norm of the gradient; 0 = off."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved as the model; 0 = off."""
    label_drop: float = 0.1
    """Share of labels replaced by "no label", so that guidance has an unconditional model."""
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks have proportionally less."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products and convolutions; weights, quantizer and optimizer stay in float32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """torch.compile every block."""
    sharding: Literal["none", "full", "experts"] = "none"
    """Over several processes. none: each holds the complete model (DDP). full: each holds a part of all weights and of
    the optimizer (FSDP2). experts: each holds a part of the experts, to which tokens are sent (expert parallelism)."""
    backend: Literal["auto", "plain"] = "auto"
    """auto: fast modules of this machine; plain: plain PyTorch modules, whose results differ by rounding."""
    workers: int = 0
    """Data workers per training process, which read and decode examples ahead; 0 = none."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Training states to keep beside the best one. If the last one is damaged, the one before it is used."""
    log_every: int = 10
    """Steps between log lines."""
    sample_every: int = 0
    """Steps between sample grids; 0 = at the end only."""
    loggers: tuple[str, ...] = ()
    """Besides log.jsonl: tensorboard, wandb."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {
            1: ("steps", "batch_size", "save_every", "log_every", "keep"),
            0: ("micro_batch", "warmup_steps", "workers", "sample_every"),
        }
        rules = {f"{n} must be at least {low}": getattr(self, n) >= low for low, ns in at_least.items() for n in ns}
        reals = ("learning_rate", "final_learning_rate", "weight_decay", "clip", "epochs", "warmup_epochs")
        rules |= {f"{n} must be 0 or more": 0 <= getattr(self, n) < math.inf for n in reals}
        shares = ("label_drop", "label_smoothing", "drop_path", "ema", "flat")
        rules |= {f"{n} must lie in 0 to below 1": 0 <= getattr(self, n) < 1 for n in shares}
        rules |= {
            "warmup_start must lie in 0 to 1": 0 <= self.warmup_start <= 1,
            "betas must be two numbers in 0 to below 1": len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "final_weight_decay must be 0 or more": self.final_weight_decay is None or self.final_weight_decay >= 0,
            "precision fp16 does not go with sharding experts, use bf16": self.precision != "fp16"
            or self.sharding != "experts",  # GradScaler cannot unscale sharded and other gradients together
            "loggers must be tensorboard or wandb": set(self.loggers) <= {"tensorboard", "wandb"},
        }
        check_fields("training", self, rules)

    def split_batch(self, processes: int) -> list[list[slice]]:
        """The micro-batches of each process, as slices of the batch: [process][micro-batch].

        Raises UserError when the batch cannot be divided evenly.
        """
        if self.batch_size % processes:
            raise UserError(f"batch_size {self.batch_size} cannot be divided among {processes} processes")
        per_process = self.batch_size // processes
        micro = min(self.micro_batch or per_process, per_process)
        return [
            [slice(i, min(i + micro, start + per_process)) for i in range(start, start + per_process, micro)]
            for start in range(0, self.batch_size, per_process)
        ]

    def schedule_steps(self, examples: int) -> tuple[int, int]:
        """(steps, warm-up steps) for this many training examples."""
        per_epoch = examples / self.batch_size
        steps = max(1, round(self.epochs * per_epoch)) if self.epochs else self.steps
        warmup = round(self.warmup_epochs * per_epoch) if self.warmup_epochs else self.warmup_steps
        return steps, min(warmup, steps)
