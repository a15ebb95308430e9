"""Training states on disk: weights, optimizer, averages, step and settings, each in one file.

    training/<task>-00000500.pt      the state after 500 steps
    training/<task>-00000500.json    its checksum, and whether its validation is still to be done
    training/<task>-best.json        the step with the lowest validation loss so far, and that loss

States are gathered from all processes, so a run may be resumed with another number of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale.common.digest import add_digest, check_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.inputs import list_changes
from nextscale.common.reading import read_json
from nextscale.config.log import read_log
from nextscale.config.migrate import migrate_record
from nextscale.config.parse import check_fields, read_record
from nextscale.config.training import TrainConfig
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.log import Values
from nextscale.training.engine.optimizer import Ema


@dataclass
class TrainState:
    """All that changes in a run."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    step: int = 0
    """Steps done."""
    frozen: bool = True
    """Whether a file has the parameters that are not trained, too."""


@dataclass(frozen=True)
class BestState:
    """The step with the lowest validation loss so far, and that loss."""

    step: int
    loss: float

    def __post_init__(self) -> None:
        check_fields("best state", self, {"step must be 0 or more": self.step >= 0})


@dataclass(frozen=True)
class StateNote:
    """What is written beside a state."""

    step: int
    sha256: str
    """Of the state's file."""
    unvalidated: bool = False
    """The model is to be validated and written at this step, and neither is finished."""
    micro_batch: int = 0
    """Examples that a process computed at once; 0 = all."""
    workers: int = 0
    """Data workers of a process."""
    examples: int = 0
    """Training examples of the run; 0 = an earlier version wrote this."""

    def __post_init__(self) -> None:
        digits = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        names = ("step", "micro_batch", "workers", "examples")
        counts = {f"{name} must be 0 or more": getattr(self, name) >= 0 for name in names}
        check_fields("state", self, {**counts, "sha256 must be 64 hex digits": digits})


class StateFiles:
    """The states of one task in a run folder."""

    computed: dict[str, int]
    """How the states to be saved are computed: `micro_batch`, `workers`, and the number of `examples`."""

    def __init__(self, folder: Path, task: str, keep: int, world: World):
        self.folder, self.task, self.keep, self.world = folder / "training", task, keep, world
        self.computed = {}

    def read_micro_batch(self) -> int | None:
        """The micro-batch that the latest state was computed with, 0 for all at once; None without a readable state."""
        for step in self.list_steps():
            try:
                return read_record(StateNote, self.path(step).with_suffix(".json")).micro_batch
            except UserError:  # `resume` passes over this state, with a warning
                continue
        return None

    def path(self, step: int) -> Path:
        """The file of the state after this many steps."""
        return self.folder / f"{self.task}-{step:08d}.pt"

    def read_best(self) -> BestState | None:
        """The best state so far. Raises UserError naming the file when its record is damaged."""
        path = self.folder / f"{self.task}-best.json"
        return read_record(BestState, path) if path.exists() else None

    def record_best(self, step: int, values: Values) -> bool:
        """Whether this validation has the lowest validation_loss so far; if so its state will be kept.

        All processes must call it; the main one has the values.
        """
        loss = values.get("validation_loss")
        measured = self.world.main and isinstance(loss, float) and math.isfinite(loss)
        (best,) = self.world.any(measured and self._write_best(step, float(loss or 0)))
        return best

    def _write_best(self, step: int, loss: float) -> bool:
        best = self.read_best()
        if best and best.step != step and not loss < best.loss:
            return False
        write_json(self.folder / f"{self.task}-best.json", add_digest({"step": step, "loss": loss}))
        return True

    def is_past_best(self, step: int, config: TrainConfig) -> bool:
        """Whether the last `patience` validations before this step have not lowered the loss. It reads the record that
        all processes share, so a run that is resumed ends where it did."""
        if step % config.save_every:
            return False
        best = self.read_best()
        if best is None or step - best.step < config.patience * config.save_every:
            return False
        if self.world.main:
            print(
                f"stopped at step {step}: the held-out loss has not fallen since step {best.step}, where it was "
                f"{best.loss:.3f} (train.patience {config.patience})"
            )
        return True

    def record_validated(self, step: int) -> None:
        """Note that the model of this step, whose state is on disk, is validated and written."""
        path = self.path(step).with_suffix(".json")
        if self.world.main and path.exists():
            write_json(path, asdict(dataclasses.replace(read_record(StateNote, path), unvalidated=False)))
            self._delete_old()

    def list_steps(self) -> list[int]:
        """Steps of the states on disk, latest first."""
        matches = (re.fullmatch(rf"{self.task}-(\d+)\.pt", p.name) for p in self.folder.glob("*.pt"))
        return sorted((int(m[1]) for m in matches if m), reverse=True)

    def save(self, state: TrainState, settings: dict[str, Any], unvalidated: bool = False) -> None:
        """Write the state, then delete all but the last `keep` and the best. All processes must call it.

        `unvalidated`: the model of this step is yet to be validated and written; a resumed run begins with that.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        content = {
            "step": state.step,
            "settings": settings,
            "module": gather_weights(state.module, state.frozen),
            "optimizer": get_optimizer_state_dict(state.module, state.optimizer, options=options),
            "ema": state.ema.state_dict() if state.ema else {},
            "scaler": state.scaler.state_dict(),
        }
        if self.world.main:
            path = self.path(state.step)
            with write_atomically(path.with_suffix(".json"), path) as (note, draft):
                torch.save(content, draft)
                write_json(note, asdict(StateNote(state.step, _compute_digest(draft), unvalidated, **self.computed)))
            self._delete_old()
        self.world.wait()

    def _delete_old(self) -> None:
        best = self.read_best()
        kept = {*self.list_steps()[: self.keep], best.step if best else None}
        for step in set(self.list_steps()) - kept:
            self.path(step).unlink(missing_ok=True)
            self.path(step).with_suffix(".json").unlink(missing_ok=True)
        for draft in self.folder.glob(f".{self.task}-*.part*"):  # a run that was killed while saving leaves one
            draft.unlink(missing_ok=True)

    def resume(self, state: TrainState, settings: dict[str, Any], accept_changes: bool) -> bool:
        """Put the latest state, if any, in place. Returns whether its model is yet to be validated and written.

        Raises UserError naming settings that differ from the state's, unless `accept_changes`.
        """
        self.read_best()  # a damaged record is an error now, and not after training up to the next save
        content, path = self._read_latest()
        step = torch.tensor([-1 if content is None else content["step"]])
        if len(set(self.world.gather(step).tolist())) > 1:
            raise UserError(f"the processes see different states in {self.folder}: it must be a folder that all share")
        if content is None:
            return False
        changes = list_changes(migrate_record(content["settings"]), settings, FREE_SETTINGS)
        if changes and not accept_changes:
            raise UserError(f"{path} belongs to a run with other settings: {'; '.join(changes)}")
        _restore(state, content, path)
        self._recover_best(state.step)
        return read_record(StateNote, path.with_suffix(".json")).unvalidated

    def _recover_best(self, step: int) -> None:
        """Take the best state up to this step from the log when its record is lost. Otherwise the next validation would
        count as the best, and a worse model would replace the best one.

        Raises UserError when the log is lost, too, though a best model was written.
        """
        record, run = self.folder / f"{self.task}-best.json", self.folder.parent
        if record.exists():
            return
        records = read_log(run / "log.jsonl") if (run / "log.jsonl").exists() else []
        records = [r for r in records if r["task"] == self.task and r["step"] <= step]
        losses = [(r["validation_loss"], r["step"]) for r in records if "validation_loss" in r]
        losses = [(loss, at) for loss, at in losses if isinstance(loss, int | float) and math.isfinite(loss)]
        if losses and self.world.main:
            loss, best = min(losses)
            self._write_best(best, float(loss))
            warnings.warn(f"{record} was missing; log.jsonl says that step {best} is the best so far", stacklevel=3)
        if not records and (run / "best").is_dir() and not any(self.folder.glob("*-best.json")):
            raise UserError(
                f"{record} and the log are missing, so nothing tells how good the model in {run / 'best'} is: restore "
                f"one of them, or move {run / 'best'} away"
            )

    def _read_latest(self) -> tuple[dict[str, Any] | None, Path]:
        """The latest sound state, if any, and its file. A damaged one is passed over with a warning.

        Raises UserError when there are states but none is sound.
        """
        faults = []
        if self.world.main and (lost := self._find_lost()):
            warnings.warn(
                f"training state {lost} is missing, though its checksum is there: it was deleted, or the run was "
                "stopped while writing it; trying the state before it",
                stacklevel=2,
            )
        for step in self.list_steps():
            path = self.path(step)
            try:
                return _read_state(path), path
            except UserError as error:
                faults.append(str(error))
                if self.world.main:
                    warnings.warn(f"{error}; trying the state before it", stacklevel=2)
        if faults:
            raise UserError(f"{'; '.join(faults)}; no sound training state is left: delete {self.folder} to train anew")
        return None, self.folder

    def _find_lost(self) -> Path | None:
        """The file of a state later than all on disk, of which only the checksum is left."""
        noted = (re.fullmatch(rf"{self.task}-(\d+)\.json", p.name) for p in self.folder.glob("*.json"))
        last, steps = max((int(m[1]) for m in noted if m), default=-1), self.list_steps()
        return self.path(last) if last > max(steps, default=-1) else None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        note = read_record(StateNote, path.with_suffix(".json"))
        if note.step != _parse_step(path):
            raise UserError(f"{path.with_suffix('.json')} is of step {note.step}")
        if _compute_digest(path) != note.sha256:
            raise UserError("its content does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "settings", "module", "optimizer", "ema", "scaler"} <= content.keys():
            raise UserError("it lacks parts of a state")
        if content["step"] != note.step or not isinstance(content["settings"], dict):
            raise UserError("its content is not of its step")
        return content
    except Exception as error:  # a damaged pickle raises nearly every type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"training state {path} cannot be used ({reason})") from error


def _parse_step(path: Path) -> int:
    """The step in the name of a state's file."""
    return int(path.stem.rsplit("-", 1)[1])


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _restore(state: TrainState, content: dict[str, Any], path: Path) -> None:
    """Put what a state file holds in place. Raises UserError when it does not fit the modules."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    try:
        if not state.frozen:
            _check_trained(state.module, content["module"])
        options = StateDictOptions(full_state_dict=True, strict=state.frozen)
        set_model_state_dict(state.module, content["module"], options=options)
        # a parameter that never got a gradient (a phi that serves no scale) has no optimizer state
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(state.module, state.optimizer, content["optimizer"], options=options)
        if content["scaler"]:  # empty where float16 was computed in float32
            state.scaler.load_state_dict(content["scaler"])
        if state.ema:
            state.ema.load_state_dict(content["ema"])
        state.step = int(content["step"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"training state {path} does not fit this model: {reason}") from error


def _check_trained(module: nn.Module, weights: dict[str, Any]) -> None:
    """Raise KeyError unless the weights are those of the parameters that are trained, and of buffers."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if differing := trained.symmetric_difference(weights) - {name for name, _ in module.named_buffers()}:
        raise KeyError(f"it has other trained parameters: {sorted(differing)[0]}")


FREE_SETTINGS = (
    "workers", "save_every", "keep", "log_every", "sample_every", "model_every", "loggers",
    "micro_batch", "sharding", "activation_checkpointing", "compile", "backend",
)  # fmt: skip
"""Settings that may change at any time: they decide how a run is computed or watched, not what it computes."""


def check_settings(folder: Path, settings: dict[str, Any], accept_changes: bool, free: tuple[str, ...] = ()) -> None:
    """Raise UserError when `folder`/run.json records a run with other settings, naming them.

    Settings in `free` may change, and all may with `accept_changes`.
    """
    if accept_changes or not (folder / "run.json").exists():
        return
    raw = read_json(folder / "run.json")
    before = migrate_record(raw)
    if not isinstance(before, dict):
        raise UserError(f"{folder}/run.json is not the record of a run; choose another --out")
    before = {name: value for name, value in before.items() if name != "digest"}
    changes = [
        c for c in list_changes(before, settings, FREE_SETTINGS) if not c.startswith(tuple(f"{name} " for name in free))
    ]
    if changes:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(changes)} (run.json); choose another --out, or give "
            "--accept-changes to go on with the new ones"
        )
    check_digest(folder / "run.json", raw)
