"""Rows of an experiment with dynamic experts: sparsify a model once for all rows that share it, and collect figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import PUBLISHED, SparsifyConfig
from nextscale.evaluation.flops import count_sampled_flops
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.dynamic import find_threshold
from nextscale.research.experiments.keys import compute_key, compute_key_of_samples, list_changed_settings
from nextscale.research.experiments.records import read_finished, read_flops, read_threshold
from nextscale.sparsify.run import sparsify

_TUNING_SETTINGS = ("data", "samples", "sampling", "images", "seed", "tune", "hoyer", "scales", "tuning")
"""Settings of `nextscale sparsify` that affect the stage tune."""
_COUNTED_IMAGES = 64
"""Images over which executed FLOPs are averaged, of all classes in turn."""


def remove_thresholds(sampling: SampleConfig) -> SampleConfig:
    """The settings for a dense model."""
    return dataclasses.replace(sampling, tau=(), budget=0.0, selection="threshold")


def sparsify_once(config: SparsifyConfig, source: Path, data: str, parent: Path, world: World) -> Path:
    """The folder under `parent` of the model that `config` makes of the dense one in `source`.

    Rows share what they can: models with the same tuning start from one tuned model, and a model that is adapted starts
    from the one that is not.
    """
    config = dataclasses.replace(config, data=data)
    published = dataclasses.replace(config, stages=PUBLISHED, adapting=SparsifyConfig().adapting)
    if "adapt" in config.stages:
        before = sparsify_once(published, source, data, parent, world)
        return _run_stages(dataclasses.replace(config, stages=("adapt", "thresholds")), before, parent, world)
    if config.tune == "none":
        return _run_stages(published, source, parent, world)
    shared = {name: getattr(published, name) for name in _TUNING_SETTINGS}
    tuned = _run_stages(SparsifyConfig(stages=("tune",), **shared), source, parent, world)
    return _run_stages(dataclasses.replace(published, stages=PUBLISHED[1:]), tuned, parent, world)


def _run_stages(config: SparsifyConfig, source: Path, parent: Path, world: World) -> Path:
    """Sparsify, unless that is finished; finished.json has the figures of these stages and of those before."""
    name = compute_key if config.data else compute_key_of_samples
    folder = parent / f"sparse-{name(str(source), _list_key_settings(config))}"
    if not (folder / "finished.json").exists():
        report = sparsify(source, folder, config, world)
        if world.main:
            before = source / "finished.json"
            stages = {**(read_finished(source)["stages"] if before.exists() else {}), **report["stages"]}
            write_json(folder / "finished.json", add_digest({"stages": stages}))
    world.wait()
    return folder


def _list_key_settings(config: SparsifyConfig) -> dict[str, Any]:
    """The settings that name a folder. `tune all` was the default of earlier versions, and is still left out: else a
    folder of theirs would be taken for one of `tune late`."""
    changed = list_changed_settings(config)
    changed.pop("tune", None)
    return changed if config.tune == "all" else {**changed, "tune": config.tune}


def match_flops(folder: Path, sampling: SampleConfig, share: float, file: Path, world: World) -> SampleConfig:
    """The settings with the threshold at which this share of the dense FLOPs is executed; `file` stores it.

    `sampling.tau` says for how many of the last scales, 1 for the sparse ones. `share` 0 leaves the settings as they
    are.
    """
    if not share:
        return sampling
    scales = max(len(sampling.tau), 1)
    if world.main and not file.exists():
        pipeline = Pipeline.from_pretrained(str(folder), device=str(world.device))
        base = dataclasses.replace(sampling, budget=0.0)
        tau = find_threshold(pipeline, _list_labels(pipeline), base, scales, share)
        write_json(file, add_digest({"tau": tau}))
    world.wait()
    return dataclasses.replace(sampling, tau=(read_threshold(file),) * scales)


def measure_flops(folder: Path, sampling: SampleConfig, file: Path, world: World) -> dict[str, float]:
    """{"gflop", "flops_share"} of an image, from the records of sampling with these settings; `file` stores them."""
    if world.main and not file.exists():
        pipeline = Pipeline.from_pretrained(str(folder), device=str(world.device))
        executed = count_sampled_flops(pipeline, _list_labels(pipeline), sampling)
        write_json(file, add_digest({"gflop": executed.flops / 1e9, "flops_share": executed.share}))
    world.wait()
    return read_flops(file)


def collect_metrics(folder: Path, sampling: SampleConfig, file: Path, world: World) -> dict[str, float]:
    """What the stages measured, and the FLOPs that sampling with these settings executes; `file` stores those."""
    executed = measure_flops(folder, sampling, file, world)
    stages: dict[str, Any] = read_finished(folder)["stages"]
    tuned, routers = stages.get("tune", {}), stages.get("routers", {})
    figures = {
        "tuned_loss": tuned.get("validation_cross_entropy"), "hoyer": tuned.get("validation_hoyer"),
        "zeros": tuned.get("validation_zeros"), "router_error": routers.get("validation_relative_error"),
        "router_recall": routers.get("validation_recall"),
    }  # fmt: skip
    return executed | {name: value for name, value in figures.items() if value is not None}


def _list_labels(pipeline: Pipeline) -> list[int | None]:
    classes = pipeline.transformer.config.condition.require_classes("this figure draws images")
    return [i % classes for i in range(_COUNTED_IMAGES)]
