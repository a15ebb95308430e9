"""The state of a run on disk: weights, optimizer, step and config, in one file that is written whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale.errors import UserError
from nextscale.files import replacing


@dataclass(frozen=True)
class TrainState:
    """Where a run stands."""

    step: int
    """Steps done."""


def save_state(
    path: Path, state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> None:
    """Write the state, replacing an older one only when the new one is complete on disk."""
    content = {
        "step": state.step,
        "config": config,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as (draft,):
        torch.save(content, draft)


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> TrainState:
    """Restore module and optimizer in place. Raises UserError for a damaged file or one of another config."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        changed = [k for k, v in content["config"].items() if config.get(k) != v]
        if changed:
            pairs = ", ".join(f"{k} was {content['config'][k]}, now {config.get(k)}" for k in changed)
            raise UserError(f"{path} belongs to a run with other settings ({pairs}); use another --out folder")
        module.load_state_dict(content["module"])
        optimizer.load_state_dict(content["optimizer"])
        return TrainState(int(content["step"]))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly every type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"training state {path} cannot be used ({reason}); delete it to train anew") from error
