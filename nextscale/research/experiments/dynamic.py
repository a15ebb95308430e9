"""Rows of an experiment whose model is sparsified: the conversion, once for all rows that share it, and its figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nextscale.common.distributed import World
from nextscale.common.files import read_json, write_json
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import PUBLISHED, SparsifyConfig
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.dynamic import count_sampled_flops, find_threshold
from nextscale.research.experiments.keys import decides, key
from nextscale.sparsify.run import sparsify

_TUNING = ("tune", "hoyer", "scales", "tuning")
"""Settings of `nextscale sparsify` that decide what tuning makes."""
_COUNTED = 64
"""Images over which executed FLOPs are averaged, of all classes in turn."""


def remove_thresholds(sampling: SampleConfig) -> SampleConfig:
    """The settings as a dense model takes them."""
    return dataclasses.replace(sampling, tau=(), budget=0.0, selection="threshold")


def sparsified(config: SparsifyConfig, source: Path, data: str, within: Path, world: World) -> Path:
    """The folder of the model that `config` makes of the dense one in `source`, made once; a tuning, too, is done once
    for all that go on from it."""
    config = dataclasses.replace(config, data=data)
    published = dataclasses.replace(config, stages=PUBLISHED, adapting=SparsifyConfig().adapting)
    if "adapt" in config.stages:
        before = sparsified(published, source, data, within, world)
        return _done(dataclasses.replace(config, stages=("adapt", "thresholds")), before, within, world)
    config = published
    if config.tune == "none":
        return _done(config, source, within, world)
    asked = {name: getattr(config, name) for name in ("data", "samples", "sampling", "images", "seed", *_TUNING)}
    tuned = _done(SparsifyConfig(stages=("tune",), **asked), source, within, world)
    return _done(dataclasses.replace(config, stages=PUBLISHED[1:]), tuned, within, world)


def _done(config: SparsifyConfig, source: Path, within: Path, world: World) -> Path:
    folder = within / f"sparse-{key(str(source), decides(config))}"
    if not (folder / "finished.json").exists():
        report = sparsify(source, folder, config, world)
        if world.main:
            before = source / "finished.json"
            stages = {**(read_json(before).get("stages", {}) if before.exists() else {}), **report["stages"]}
            write_json(folder / "finished.json", {"stages": stages})
    world.wait()
    return folder


def sampling_at(folder: Path, sampling: SampleConfig, share: float, kept: Path, world: World) -> SampleConfig:
    """The settings with the threshold at which this share of the dense FLOPs is executed, found once and `kept`.

    `sampling.tau` says how many of the last scales the threshold is for, 1 for the sparse ones.
    """
    if not share:
        return sampling
    if world.main and not kept.exists():
        pipeline = Pipeline.from_pretrained(str(folder), device=str(world.device))
        base = dataclasses.replace(sampling, budget=0.0)
        write_json(kept, {"tau": find_threshold(pipeline, _labels(pipeline), base, max(len(sampling.tau), 1), share)})
    world.wait()
    return dataclasses.replace(sampling, tau=(read_json(kept)["tau"],) * max(len(sampling.tau), 1))


def dynamic_figures(folder: Path, sampling: SampleConfig, kept: Path, world: World) -> dict[str, float]:
    """What the stages measured, and the FLOPs that sampling with these settings executed, counted once and `kept`."""
    if world.main and not kept.exists():
        pipeline = Pipeline.from_pretrained(str(folder), device=str(world.device))
        executed = count_sampled_flops(pipeline, _labels(pipeline), sampling)
        write_json(kept, {"gflop": executed.flops / 1e9, "flops_share": executed.share})
    world.wait()
    stages: dict[str, Any] = read_json(folder / "finished.json")["stages"]
    found: dict[str, float] = dict(read_json(kept))
    tuned, routers = stages.get("tune", {}), stages.get("routers", {})
    names = {
        "tuned_loss": tuned.get("validation_cross_entropy"), "hoyer": tuned.get("validation_hoyer"),
        "zeros": tuned.get("validation_zeros"), "router_error": routers.get("validation_relative_error"),
        "router_recall": routers.get("validation_recall"),
    }  # fmt: skip
    return found | {name: value for name, value in names.items() if value is not None}


def _labels(pipeline: Pipeline) -> list[int | None]:
    classes = pipeline.transformer.config.condition.num_classes
    return [i % classes for i in range(_COUNTED)]
