"""Reads the JSON files of an experiment's folders, with the types and ranges of what is used of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.parse import check_fields, read_record
from nextscale.training.open_run import name_kept_model


@dataclass(frozen=True)
class _Finished:
    """finished.json of a training or of stages."""

    validation_loss: float | None = None
    validation_loss_per_scale: tuple[float, ...] = ()
    validation_guidance: float | None = None
    validation_expert_load: tuple[float, ...] = ()
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """run.json."""

    data: str
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """Measured seconds of an experiment's rows."""

    about: str
    """A checksum of what was measured."""
    rows: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class _Threshold:
    tau: float

    def __post_init__(self) -> None:
        check_fields("thresholds", self, {"tau must lie in 0 to 1": 0 <= self.tau <= 1})


@dataclass(frozen=True)
class _Flops:
    gflop: float
    flops_share: float

    def __post_init__(self) -> None:
        rules = {"gflop must be above 0": self.gflop > 0, "flops_share must be above 0": self.flops_share > 0}
        check_fields("FLOPs", self, rules)


@dataclass(frozen=True)
class _Values:
    """Shares, or standard deviations, by metric."""

    values: dict[str, float]

    def __post_init__(self) -> None:
        check_fields("record", self, {"values must be 0 or more": all(v >= 0 for v in self.values.values())})


@dataclass(frozen=True)
class _Report:
    """The report of `nextscale evaluate`."""

    measures: dict[str, dict[str, Any]]
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    other: dict[str, Any] = field(default_factory=dict)


def read_finished(folder: Path, scales: int = 0) -> dict[str, Any]:
    """finished.json of a training's folder; of a model with so many scales, where it has been validated per scale."""
    path = folder / "finished.json"
    finished = read_record(_Finished, path, finite=False)
    found = len(finished.validation_loss_per_scale)
    if scales and finished.validation_loss is not None and found != scales:
        raise UserError(f"{path}: validation_loss_per_scale has {found} numbers, the model has {scales} scales")
    if len(finished.validation_expert_load) == 1:
        raise UserError(f"{path}: validation_expert_load has one number; it must have one for each expert")
    names = ("validation_loss", "validation_loss_per_scale", "validation_guidance", "validation_expert_load")
    known = {name: getattr(finished, name) for name in names if getattr(finished, name) not in (None, ())}
    return {**finished.other, **known, "stages": finished.stages}


def find_kept_model(run: Path, share: float) -> tuple[Path, int, dict[str, Any]]:
    """The model that a finished training kept nearest to this share of its steps; its step and its validation.

    A share of 1 is the run's own model. Raises UserError when no model was kept.
    """
    validated = {r["step"]: r for r in read_log(run / "log.jsonl") if "validation_loss" in r}
    steps = max(validated)
    if share == 1:
        return run, steps, read_finished(run)
    kept = [step for step in validated if (run / name_kept_model(step)).is_dir()]
    if not kept:
        raise UserError(f"{run} kept no model besides the last one: its training needs train.model_every")
    step = min(kept, key=lambda step: abs(step - share * steps))
    return run / name_kept_model(step), step, validated[step]


def read_data_name(folder: Path) -> str:
    """The data of the run in a folder, from its run.json."""
    return read_record(_Run, folder / "run.json").data


def read_costs(path: Path, rows: int) -> Costs:
    """Measured costs of so many rows."""
    costs = read_record(Costs, path)
    if len(costs.rows) != rows:
        raise UserError(f"{path}: rows has {len(costs.rows)} entries instead of {rows}; delete the file")
    return costs


def read_threshold(path: Path) -> float:
    """The threshold that was found for a share of the FLOPs."""
    return read_record(_Threshold, path).tau


def read_flops(path: Path) -> dict[str, float]:
    """FLOPs that sampling executed: {"gflop", "flops_share"}."""
    flops = read_record(_Flops, path)
    return {"gflop": flops.gflop, "flops_share": flops.flops_share}


def read_values(path: Path) -> dict[str, float]:
    """Shares of a model's attention, or deviations of its losses, by metric."""
    return read_record(_Values, path).values


def read_measures(path: Path) -> tuple[str, dict[str, Any]]:
    """The only feature network of a report of `nextscale evaluate`, and its metrics."""
    measures = read_record(_Report, path, finite=False).measures
    if len(measures) != 1:
        raise UserError(f"{path}: measures must be of one feature network, but has {len(measures)}")
    return next(iter(measures.items()))


def read_report(path: Path) -> dict[str, Any]:
    """The report of `nextscale tokenizer evaluate`."""
    return read_record(_Table, path, finite=False).other
