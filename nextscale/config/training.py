"""Settings of training. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextscale.common.dtypes import Dtype, parse_dtype
from nextscale.common.errors import UserError
from nextscale.config.idle import Idle
from nextscale.config.parse import SEED_RULE, check_fields, is_seed

_MANY_PASSES = 500
"""Passes over the data that no recipe of the papers reaches (VAR-d30: 350)."""
NO_GENERATOR = ("label_drop", "drop_path", "sample_every", "model_every", "compile", "activation_checkpointing")
"""Settings that only transformers use: they have labels to drop, blocks, samples to draw, and models to keep."""


def is_auto_or_count(value: object) -> bool:
    """Whether a setting is "auto" or a number of 0 or more."""
    return value == "auto" or (isinstance(value, int) and value >= 0)


@dataclass(frozen=True)
class TrainConfig:
    """Training of one model: AdamW, a linear warm-up, then a decay to the final learning rate."""

    steps: int = 1000
    """Optimizer steps in all. More steps lower the loss until the held-out one rises; with few images take fewer."""
    epochs: float = 0.0
    """Length of the run as passes over the training examples, in place of steps; 0 = use `steps`."""
    batch_size: int = 64
    """Examples per optimizer step, over all processes. Larger batches give smoother steps and want a larger learning
    rate; if memory is short, micro_batch divides it."""
    micro_batch: int | Literal["auto"] = "auto"
    """Examples per forward pass and process: gradients of several passes are accumulated to batch_size. auto: as many
    as the memory takes, chosen once for a run. 0 = all at once."""
    learning_rate: float = 1e-3
    """Largest learning rate, reached after the warm-up. Lower it when the loss is not finite or jumps."""
    final_learning_rate: float = 1e-5
    """Learning rate of the last step, usually a hundredth of the largest one or less."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up: half a cosine, or flat for a while and then a straight line (VAR's recipe)."""
    flat: float = 0.05
    """Linear schedule: share of the steps after the warm-up at the full learning rate."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises to its largest value. Give more when the first steps are unstable."""
    warmup_epochs: float = 0.0
    """Warm-up in epochs, instead of warmup_steps, when above 0."""
    warmup_start: float = 0.005
    """Share of the learning rate that the warm-up starts from."""
    weight_decay: float = 0.05
    """Not applied to biases, norms, and position and level embeddings."""
    final_weight_decay: float | None = None
    """Reached along half a cosine; none = constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the averages of the gradient and of its square. Raise the second, to 0.999, when small batches
    make the loss noisy."""
    clip: float = 2.0
    """Largest norm of the gradient; 0 = off."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved as the model; 0 = off."""
    label_drop: float = 0.1
    """Share of labels replaced by "no label", so that guidance has an unconditional model."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all tokens (or classes), against overconfidence; 0 = off."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks have proportionally less."""
    precision: Dtype = "float32"
    """Type of matrix products and convolutions; weights, quantizer and optimizer stay in float32. auto: bfloat16 where
    the device is faster in it, else float32; a resumed run keeps it. float16 scales the loss."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """torch.compile every block: faster steps on a GPU, after minutes of compiling."""
    sharding: Literal["none", "full", "experts"] = "none"
    """Over several processes. none: each holds the complete model (DDP). full: each holds a part of all weights and of
    the optimizer (FSDP2). experts: each holds a part of the experts, to which tokens are sent (expert parallelism)."""
    backend: Literal["auto", "plain"] = "auto"
    """auto: fast modules of this machine; plain: plain PyTorch modules, whose results differ by rounding."""
    workers: int | Literal["auto"] = "auto"
    """Data workers per training process, which read and decode examples ahead; 0 = none. auto: by the cores, and none
    where no images are decoded. They do not change the result."""
    save_every: int = 200
    """Steps between checkpoints, each with a validation. Also the most that a crash can lose."""
    patience: int = 0
    """Stop when the held-out loss has not fallen for this many saves, and keep the model of the lowest one, as helps
    with few images; 0 = take all steps."""
    keep: int = 2
    """Training states to keep beside the best one. If the last one is damaged, the one before it is used."""
    log_every: int = 10
    """Steps between lines of log.jsonl, which curves.png shows."""
    sample_every: int = 0
    """Steps between sample grids; 0 = at the end only."""
    model_every: int = 0
    """Steps between models that are kept in kept/step-NNNNNNNN, to measure quality over the training; a multiple of
    save_every. 0 = the last model alone."""
    loggers: tuple[str, ...] = ()
    """Where values are logged besides log.jsonl: tensorboard, wandb, or both."""
    seed: int = 0
    """Seed of initial weights, split, order and augmentation. Change it to see how much a result varies."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", parse_dtype(self.precision, "precision"))
        at_least = {
            1: ("steps", "batch_size", "save_every", "log_every", "keep"),
            0: ("warmup_steps", "sample_every", "model_every", "patience"),
        }
        rules = {f"{n} must be at least {low}": getattr(self, n) >= low for low, ns in at_least.items() for n in ns}
        rules |= {
            f"{n} must be auto or at least 0": is_auto_or_count(getattr(self, n)) for n in ("micro_batch", "workers")
        }
        reals = ("learning_rate", "final_learning_rate", "weight_decay", "clip", "epochs", "warmup_epochs")
        rules |= {f"{n} must be 0 or more": 0 <= getattr(self, n) < math.inf for n in reals}
        shares = ("label_drop", "label_smoothing", "drop_path", "ema", "flat")
        rules |= {f"{n} must lie in 0 to below 1": 0 <= getattr(self, n) < 1 for n in shares}
        rules |= {
            "warmup_start must lie in 0 to 1": 0 <= self.warmup_start <= 1,
            "betas must be two numbers in 0 to below 1": len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "final_weight_decay must be 0 or more": self.final_weight_decay is None or self.final_weight_decay >= 0,
            "precision float16 does not go with sharding experts, use bfloat16": self.precision != "float16"
            or self.sharding != "experts",  # GradScaler cannot unscale sharded and other gradients together
            "model_every must be a multiple of save_every": self.model_every % max(self.save_every, 1) == 0,
            SEED_RULE: is_seed(self.seed),
            "loggers must be tensorboard or wandb": set(self.loggers) <= {"tensorboard", "wandb"},
        }
        check_fields("training", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if self.epochs:
            idle[f"{{at}}epochs {self.epochs:g} sets the number of steps; 0 would leave it to {{at}}steps"] = ("steps",)
        if self.warmup_epochs:
            idle[f"{{at}}warmup_epochs {self.warmup_epochs:g} sets the warm-up"] = ("warmup_steps",)
        elif not self.warmup_steps:
            idle["there is no warm-up ({at}warmup_steps is 0)"] = ("warmup_start",)
        if self.schedule != "linear":
            idle["it belongs to {at}schedule linear"] = ("flat",)
        if self.micro_batch != "auto" and self.micro_batch > self.batch_size:
            idle[f"{{at}}batch_size is only {self.batch_size}"] = ("micro_batch",)
        return idle

    def list_doubts(self) -> list[str]:
        """Values under which a run learns nothing or does not do what its schedule says."""
        doubts = {
            "{at}learning_rate is 0: nothing is learned": self.learning_rate == 0,
            f"{{at}}final_learning_rate {self.final_learning_rate:g} is above {{at}}learning_rate "
            f"{self.learning_rate:g}: the rate rises until the end": 0 < self.learning_rate < self.final_learning_rate,
        }
        return [doubt for doubt, applies in doubts.items() if applies]

    def list_schedule_doubts(self, examples: int, processes: int = 1) -> list[str]:
        """Sentences about settings that do not fit the length of the run, for this many training examples."""
        steps, warmup = self.schedule_steps(examples)
        passes, kept = steps * self.batch_size / max(examples, 1), self.ema**steps
        doubts = {
            f"the warm-up takes all {steps:,} steps: the learning rate does not stay at its peak; give fewer "
            "warmup_steps": 1 < steps <= warmup,
            f"save_every {self.save_every:,} is more than the {steps:,} steps: the model is validated and saved at the "
            "end only": self.save_every > steps and self.save_every != TrainConfig.save_every,
            f"sample_every {self.sample_every:,} is more than the {steps:,} steps: samples are drawn at the end "
            "only": self.sample_every > steps,
            f"ema {self.ema:g} is too slow for {steps:,} steps: {kept:.0%} of the averaged weights, which are saved, "
            "are the initial ones; give a smaller ema": self.ema > 0 and kept > 0.05,
            f"{steps:,} steps of {self.batch_size} are {passes:,.0f} passes over {examples:,} training examples, far "
            f"more than so few can teach: give less, such as epochs {_MANY_PASSES // 5} "
            f"({-(-_MANY_PASSES // 5 * examples // self.batch_size):,} steps)": passes > _MANY_PASSES,
            f"batch_size {self.batch_size} is more than the {examples:,} training examples: a step sees some of them "
            "several times": self.batch_size > examples,
            f"micro_batch {self.micro_batch} has no effect: a process computes only {self.batch_size // processes} "
            "examples": self.micro_batch != "auto"
            and self.batch_size > self.micro_batch > self.batch_size // processes,
            f"sharding {self.sharding} has no effect: there is one process": self.sharding != "none" and processes == 1,
        }
        return [doubt for doubt, applies in doubts.items() if applies]

    def split_batch(self, processes: int) -> list[list[slice]]:
        """The micro-batches of each process, as slices of the batch: [process][micro-batch]. auto counts as all.

        Raises UserError when the batch cannot be divided evenly.
        """
        if self.batch_size % processes:
            raise UserError(f"batch_size {self.batch_size} cannot be divided among {processes} processes")
        per_process = self.batch_size // processes
        given = 0 if self.micro_batch == "auto" else self.micro_batch
        micro = min(given or per_process, per_process)
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
