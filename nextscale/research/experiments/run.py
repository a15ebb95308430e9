"""Runs an experiment: its inputs first, then every row with every seed, then the table.

Finished trainings and measurements are not repeated, see runner.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.extras import check_extras, list_data_needs, list_network_needs
from nextscale.config.parse import to_dict
from nextscale.data.cache import is_token_cache
from nextscale.research.experiments.choosing import choose_settings, describe_choices
from nextscale.research.experiments.entry import Experiment, Row
from nextscale.research.experiments.folders import Folders, Inputs, resolve_model_path
from nextscale.research.experiments.keys import compute_key
from nextscale.research.experiments.progress import analyse_progress
from nextscale.research.experiments.report import write_results
from nextscale.research.experiments.runner import ExperimentRunner
from nextscale.research.experiments.scaling import analyse_scaling
from nextscale.research.experiments.timing import Job, describe_progress

_OPTIONS = {
    "data": "images to train on",
    "tokenizer": "a checkpoint folder with a tokenizer",
    "features": "a feature network (see `nextscale evaluate --help`)",
    "reference": "images to compare with, or their statistics",
    "encoder": "an encoder for semantic guidance (see `nextscale encoder evaluate --help`)",
}


def resolve_inputs(experiment: Experiment, given: dict[str, str]) -> Inputs:
    """The user's inputs, else the entry's. UserError names a missing option and what it expects."""
    model = given.get("model", "")
    if model and (
        experiment.kind == "tokenizer" or len({compute_key(to_dict(row.run)) for row in experiment.rows}) > 1
    ):
        raise UserError(f"the rows of {experiment.name} differ in training: one --model cannot stand for them all")
    if model and experiment.choice is not None:
        raise UserError(f"experiment {experiment.name} chooses settings of its trainings: it takes no --model")
    refiner = given.get("refiner", "")
    if experiment.refiner is None and refiner:
        raise UserError(f"experiment {experiment.name} takes no --refiner")
    if experiment.refiner is not None and bool(refiner) != bool(model):
        raise UserError(f"experiment {experiment.name} takes --model and --refiner together, or trains both")
    values = {"model": model, "refiner": refiner}
    for name, default in experiment.needs.items():
        value = given.get(name) or default
        if not value and not (model and name in ("data", "tokenizer")):
            raise UserError(
                f"experiment {experiment.name} at scale {experiment.scale} needs --{name}: {_OPTIONS[name]}. "
                f"{experiment.note}".strip()
            )
        values[name] = resolve_model_path(value)
    encoders = {row.run.loss.encoder for row in experiment.rows if row.measured} - {""}
    if len(encoders) > 1 and is_token_cache(Path(values["data"])):
        raise UserError(f"the rows of {experiment.name} differ in their encoder: --data must be images, not a cache")
    return Inputs(**values)


def _list_needs(experiment: Experiment, inputs: Inputs) -> dict[str, str]:
    """The optional packages that a whole experiment needs, {package: purpose}."""
    needs = {"matplotlib": "the figure of an experiment"}
    for data in (inputs.data, inputs.reference):
        needs |= list_data_needs(data)
    for network in (inputs.features, inputs.encoder, *(row.run.loss.encoder for row in experiment.rows)):
        needs |= list_network_needs(network)
    return needs


def list_jobs(experiment: Experiment, inputs: Inputs, out: Path) -> list[Job]:
    """The trainings and measurements of an experiment, with their folders in `out`/SCALE; none of a given model."""
    folders = Folders(experiment, inputs, out / experiment.scale)
    rows = [row for row in experiment.rows if row.measured]
    if inputs.model:
        return []
    if experiment.kind == "cost":
        return [Job(row.name, folders.plan_training(row, experiment.seeds[0])[1]) for row in rows]
    candidates: list[Job] = []
    known = {row.name for row in rows}
    if experiment.choice is not None:
        choice = experiment.choice
        candidates = [
            Job(row.name, folders.plan_training(choice.apply(row, settings), seed)[1])
            for row in (rows[:1] if choice.of_first_row else rows)
            for settings in choice.list_settings()
            for seed in choice.seeds
        ]
        experiment, found = choose_settings(experiment, folders)
        rows, known = [row for row in experiment.rows if row.measured], set(found)

    def find_folder(row: Row, seed: int) -> Path:
        if experiment.kind == "tokenizer":
            return folders.name_tokenizer(row, seed)
        return folders.plan_training(folders.refiner_row if row.refiner_only else row, seed)[1]

    return candidates + [
        Job(row.name, find_folder(row, seed), experiment.name_measuring(row, seed), row.name in known)
        for seed in experiment.seeds
        for row in rows
    ]


def format_progress(experiment: Experiment, inputs: Inputs, out: Path) -> str:
    """What is done of an experiment, what is left and how long it takes; empty where nothing is trained."""
    jobs = list_jobs(experiment, inputs, out)
    return f"{experiment.name}: {describe_progress(jobs)}" if jobs else ""


def run_experiment(experiment: Experiment, inputs: Inputs, out: Path, world: World) -> dict[str, Any]:
    """Run what is not finished in `out`/SCALE; write results.json, table.md and figure.png to `out`/SCALE/NAME.

    Returns the results; empty on all processes but the first. Raises what training and evaluation raise.
    """
    check_extras(_list_needs(experiment, inputs))
    folder = out / experiment.scale
    progress = format_progress(experiment, inputs, out)
    if world.main and progress:
        print(progress, flush=True)
    runner, choices = ExperimentRunner(experiment, inputs, folder, world), {}
    if experiment.choice is not None:
        seeds = experiment.choice.seeds
        experiment, found = choose_settings(experiment, runner.folders, runner.train_candidate)
        runner, choices = ExperimentRunner(experiment, inputs, folder, world), describe_choices(found, seeds)
    values: dict[str, list[dict[str, float]]] = {row.name: [] for row in experiment.rows}
    if experiment.kind == "cost":
        values |= runner.measure_cost(folder / experiment.name / "times.json")
    jobs = [
        (row, seed)
        for seed in experiment.seeds
        for row in experiment.rows
        if row.measured and experiment.kind != "cost"
    ]
    for number, (row, seed) in enumerate(jobs, start=1):
        if world.main:
            print(f"== {experiment.name}: {row.name}, seed {seed} ({number} of {len(jobs)})", flush=True)
        measure = runner.measure_generator if experiment.kind == "generator" else runner.measure_tokenizer
        values[row.name].append(measure(row, seed))
        world.wait()
    out = folder / experiment.name
    runner.draw_pictures(out)
    measured = [row for row in experiment.rows if row.measured and experiment.one_training]
    noise = {row.name: runner.measure_noise(row, values[row.name]) for row in measured}
    if not world.main:
        return {}
    details: dict[str, dict[str, Any]] = {"chosen": choices}
    if "progress" in experiment.pictures:
        details["progress"] = analyse_progress(runner.list_trainings(), experiment.find_reference().name, out)
    if noise:
        details["noise"] = noise
    scaling = analyse_scaling(runner.list_trainings(), out) if "scaling" in experiment.pictures else None
    return write_results(experiment, inputs, values, out, world, details, scaling)
