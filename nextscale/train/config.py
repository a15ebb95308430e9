"""Settings of a training run. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextscale.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training: AdamW, linear warm-up, then cosine to the final learning rate."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.05
    """Not applied to biases, norms, and position and level embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 2.0
    """Largest norm of the gradient; 0 = off."""
    label_drop: float = 0.1
    """Share of labels replaced by "no label", so that guidance has an unconditional model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What matrix products and convolutions compute in; weights, quantiser and optimizer stay in float32."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks have proportionally less."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training: {name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "clip", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training: {name} must be 0 or more; got {getattr(self, name)}")
        if not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"training: betas must lie in 0 to below 1; got {self.betas}")
        for name in ("label_drop", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"training: {name} must lie in 0 to below 1; got {getattr(self, name)}")
