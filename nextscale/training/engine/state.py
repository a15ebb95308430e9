"""The states of a run on disk: weights, optimizer, averages, step and settings, each in one file that is written whole.

    training/<task>-00000500.pt      the state after 500 steps
    training/<task>-00000500.json    its checksum
    training/<task>-best.json        which step was the best one held out, and its loss

States are gathered from all processes, so a run may go on with another number of them.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import read_json, write_atomically, write_json
from nextscale.training.engine.parallel import Ema, whole_weights


@dataclass
class Learner:
    """All that changes in a run."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    step: int = 0
    """Steps done."""


class StateFiles:
    """The states of one task in a run folder."""

    def __init__(self, folder: Path, task: str, keep: int, world: World):
        self.folder, self.task, self.keep, self.world = folder / "training", task, keep, world

    def path(self, step: int) -> Path:
        return self.folder / f"{self.task}-{step:08d}.pt"

    @property
    def best(self) -> dict[str, Any]:
        """{"step", "loss"} of the best state so far, or {}."""
        path = self.folder / f"{self.task}-best.json"
        return read_json(path) if path.exists() else {}

    def note_best(self, step: int, loss: float) -> bool:
        """Whether this step is the best so far; if so it is noted, and its state kept. For the main process."""
        best = self.best
        if best and best["step"] != step and not loss < best["loss"]:
            return False
        write_json(self.folder / f"{self.task}-best.json", {"step": step, "loss": loss})
        return True

    def steps(self) -> list[int]:
        """Steps of the states on disk, latest first."""
        found = (re.fullmatch(rf"{self.task}-(\d+)\.pt", p.name) for p in self.folder.glob("*.pt"))
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def save(self, learner: Learner, settings: dict[str, Any]) -> None:
        """Write the state. Older ones stay until it is complete; then all but the last `keep` and the best go."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        content = {
            "step": learner.step,
            "settings": settings,
            "module": whole_weights(learner.module),
            "optimizer": get_optimizer_state_dict(learner.module, learner.optimizer, options=options),
            "ema": learner.ema.state() if learner.ema else {},
            "scaler": learner.scaler.state_dict(),
        }
        if self.world.main:
            path = self.path(learner.step)
            with write_atomically(path.with_suffix(".json"), path) as (note, draft):
                torch.save(content, draft)
                write_json(note, {"step": learner.step, "sha256": _digest(draft)})
            self._clean()
        self.world.wait()

    def _clean(self) -> None:
        kept = {*self.steps()[: self.keep], self.best.get("step")}
        for step in set(self.steps()) - kept:
            self.path(step).unlink(missing_ok=True)
            self.path(step).with_suffix(".json").unlink(missing_ok=True)
        for draft in self.folder.glob(f".{self.task}-*.part*"):  # a run killed while it saved leaves one
            draft.unlink(missing_ok=True)

    def read(self) -> tuple[dict[str, Any], Path] | None:
        """The latest sound state and its file, or None. A damaged one is passed over with a warning.

        Raises UserError when there are states but none is sound.
        """
        faults = []
        for step in self.steps():
            path = self.path(step)
            try:
                return _read(path), path
            except UserError as error:
                faults.append(str(error))
                if self.world.main:
                    warnings.warn(f"{error}; trying the state before it", stacklevel=2)
        if faults:
            raise UserError(f"{'; '.join(faults)}; no sound training state is left: delete {self.folder} to train anew")
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        note = read_json(path.with_suffix(".json"))
        if _digest(path) != note["sha256"]:
            raise UserError("its content does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "settings", "module", "optimizer", "ema", "scaler"} <= content.keys():
            raise UserError("it lacks parts of a state")
        return content
    except Exception as error:  # a damaged pickle raises nearly every type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"training state {path} cannot be used ({reason})") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def restore(learner: Learner, content: dict[str, Any], path: Path) -> None:
    """Put a state back in place. Raises UserError when it does not fit the modules."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    try:
        set_model_state_dict(learner.module, content["module"], options=StateDictOptions(full_state_dict=True))
        # a parameter that never got a gradient (a phi that serves no scale) has no optimizer state
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(learner.module, learner.optimizer, content["optimizer"], options=options)
        learner.scaler.load_state_dict(content["scaler"])
        if learner.ema:
            learner.ema.load(content["ema"])
        learner.step = int(content["step"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"training state {path} does not fit this model: {reason}") from error


HOW_NOT_WHAT = (
    "workers", "save_every", "keep", "log_every", "sample_every", "loggers",
    "micro_batch", "sharding", "activation_checkpointing", "compile",
)  # fmt: skip
"""Settings that may change at any time: they say how a run is computed or watched, not what it computes."""


def changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What differs between two settings, as "train.learning_rate was 0.001, now 0.5"."""
    found = []
    for key in sorted({*before, *now} - set(HOW_NOT_WHAT)):
        old, new, name = before.get(key), now.get(key), f"{where}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {old}, now {new}")
    return found


def check_run(folder: Path, settings: dict[str, Any], accept_changes: bool, free: tuple[str, ...] = ()) -> None:
    """Raise UserError when `folder`/run.json says that the run there has other settings, naming them.

    Settings in `free` may change, and all may with `accept_changes`.
    """
    if accept_changes or not (folder / "run.json").exists():
        return
    before = read_json(folder / "run.json")
    if not isinstance(before, dict):
        raise UserError(f"{folder}/run.json is not the record of a run; choose another --out")
    changed = [c for c in changes(before, settings) if not c.startswith(tuple(f"{name} " for name in free))]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}; choose another --out, or give "
            "--accept-changes to go on with the new ones"
        )
