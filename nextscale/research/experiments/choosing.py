"""Settings that an experiment chooses for each row before its reported seeds are trained, such as the learning rate.

Every row has the same candidates, trained with seeds that are not reported; the lowest held-out loss decides. All rows
thus have the same budget of trainings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.research.experiments.entry import Experiment, Row
from nextscale.research.experiments.folders import Folders
from nextscale.research.experiments.records import read_finished
from nextscale.research.experiments.timing import DIVERGED


@dataclass(frozen=True)
class Candidate:
    """One combination of values, and the losses that it was judged by."""

    settings: dict[str, Any]
    losses: tuple[float | None, ...]
    """Of each seed, in nats per token; infinite where the training diverged, None where it is not finished."""

    @property
    def mean(self) -> float:
        """The mean loss over the seeds."""
        return statistics.fmean(loss for loss in self.losses if loss is not None)

    @property
    def complete(self) -> bool:
        """Whether all seeds are trained."""
        return None not in self.losses

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; null is the loss of a training that diverged."""
        losses = [loss if loss is not None and math.isfinite(loss) else None for loss in self.losses]
        return {"settings": self.settings, "losses": losses}


def note_divergence(folder: Path, error: UserError) -> None:
    """Record that the training in a folder stopped at values that are not finite."""
    write_json(folder / DIVERGED, {"error": str(error)})


def read_loss(folder: Path) -> float | None:
    """The held-out loss of the training in a folder; infinite where it diverged, None where it is not finished."""
    if (folder / DIVERGED).exists():
        return math.inf
    if not (folder / "finished.json").exists():
        return None
    loss = read_finished(folder).get("validation_loss")
    if loss is None:
        raise UserError(f"{folder} has no held-out loss to choose settings by: hold out images (images.held_out)")
    return loss if math.isfinite(loss) else math.inf


def list_candidates(row: Row, experiment: Experiment, folders: Folders) -> list[Candidate]:
    """The candidates of a row, with the losses that are there."""
    assert experiment.choice is not None, "called for experiments that choose"
    found = []
    for settings in experiment.choice.list_settings():
        changed = experiment.choice.apply(row, settings)
        places = [folders.plan_training(changed, seed)[1] for seed in experiment.choice.seeds]
        found.append(Candidate(settings, tuple(map(read_loss, places))))
    return found


def choose(row: Row, candidates: list[Candidate]) -> Candidate:
    """The candidate of the lowest mean loss, of equal ones the first. UserError where all have diverged."""
    best = min(candidates, key=lambda candidate: candidate.mean)
    if not math.isfinite(best.mean):
        raise UserError(f"row {row.name}: the training diverged with all values to choose from; add smaller ones")
    return best


def choose_settings(
    experiment: Experiment, folders: Folders, train: Callable[[Row, int], Any] | None = None
) -> tuple[Experiment, dict[str, tuple[Candidate, list[Candidate]]]]:
    """The experiment with the chosen settings in its rows, and of each row the choice and all candidates.

    `train(row, seed)` makes what is missing; without it, rows whose candidates are not all trained are left out of the
    choices and stay as they are. Raises UserError where all candidates of a row have diverged.
    """
    choice = experiment.choice
    if choice is None:
        return experiment, {}
    rows = [row for row in experiment.rows if row.measured]
    judged = rows[:1] if choice.of_first_row else rows
    for row in judged if train is not None else ():
        for settings in choice.list_settings():
            for seed in choice.seeds:
                assert train is not None, "the loop is empty without it"
                train(choice.apply(row, settings), seed)
    found = {row.name: list_candidates(row, experiment, folders) for row in judged}
    found = {name: candidates for name, candidates in found.items() if all(c.complete for c in candidates)}
    if choice.of_first_row and found:
        found = {row.name: found[judged[0].name] for row in rows}
    choices = {row.name: (choose(row, found[row.name]), found[row.name]) for row in rows if row.name in found}
    changed = tuple(
        choice.apply(row, choices[row.name][0].settings) if row.name in choices else row for row in experiment.rows
    )
    return replace(experiment, rows=changed, choice=None), choices


def describe_choices(choices: dict[str, tuple[Candidate, list[Candidate]]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """The choices as JSON values: {row: {"settings", "seeds", "candidates"}}."""
    return {
        name: {
            "settings": chosen.settings,
            "seeds": list(seeds),
            "candidates": [candidate.to_dict() for candidate in candidates],
        }
        for name, (chosen, candidates) in choices.items()
    }
