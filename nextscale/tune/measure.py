"""Measures the candidates of a search on a model: times beside the dense model, distances of paired images.

Everything is kept in the folder of the search, so that the same command goes on after a stop:

    measurements.json     each measurement with the seconds that it took
    features/             features of the samples of each candidate, and of the reference
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.digest import add_digest
from nextscale.common.files import write_json
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.rng import make_generator
from nextscale.config.parse import read_record, to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.tune import TuneConfig
from nextscale.data.given import ImageConditions
from nextscale.data.parts import choose_part
from nextscale.encoders.network import FeatureNetwork
from nextscale.evaluation.extract import Extraction, extract_features, read_features, record_extraction
from nextscale.evaluation.images import ConditionedImages, MeasuredImages, ModelImages
from nextscale.evaluation.latency import give_classes, time_batch
from nextscale.evaluation.metrics.paired import PairedLoss, compare_distances
from nextscale.pipeline import Pipeline
from nextscale.tune.options import DENSE, Candidate

JOURNAL = "measurements.json"
_REFERENCE_SHARD = 1000
_FEATURE_BATCH = 48
_ROUNDS_OF_GRAPHS = 3
"""Untimed rounds on a GPU, where graphs may be captured."""


@dataclass(frozen=True)
class Measurement:
    """One entry of the journal."""

    seconds: float
    """How long it took."""
    rounds: tuple[tuple[float, ...], ...] = ()
    """Of a speed: seconds of a batch of the dense model and of the candidate, in alternating rounds."""
    distance: float = 0.0
    baseline: float = 0.0
    error: float = 0.0
    """Of a loss, see `PairedLoss`."""


@dataclass(frozen=True)
class _Journal:
    measurements: dict[str, Measurement] = field(default_factory=dict)


class GrowingSamples(ModelImages):
    """Samples of which more may be measured later: what is stored of the first ones stays valid."""

    def identity(self) -> dict[str, Any]:
        known = super().identity()
        return {name: value for name, value in known.items() if name not in ("images", "samples_per_class")}


class GrowingConditioned(ConditionedImages):
    """The same of a model that draws from more than a class."""

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity().items() if name != "images"}


class ModelMeasurer:
    """Measures candidates on a model. `seconds` counts the measurements that were asked for, made now or stored."""

    def __init__(
        self, model: str, network: FeatureNetwork, reference: MeasuredImages, base: SampleConfig, config: TuneConfig,
        folder: Path, device: torch.device, given: ImageConditions | None = None,
    ):  # fmt: skip
        """`base`: the settings of the dense model. `given`: what images are drawn from; None: all classes in turn."""
        self.given = given
        self.model, self.network, self.base, self.config = model, network, base, config
        self.folder, self.device, self.shard, self.seconds = folder, device, config.shard, 0.0
        path = folder / JOURNAL
        self.journal = dict(read_record(_Journal, path).measurements) if path.exists() else {}
        self.rounds: dict[tuple[str, bool], list[tuple[float, ...]]] = {}
        """Seconds of the dense model and of a candidate in each round, by its name and whether it is held out."""
        self._pipelines: dict[str, Pipeline] = {}
        self._warm: set[str] = set()
        self._recorded: set[str] = set()
        self.load(DENSE.dtype)  # before anything is measured
        self.references = self._divide_reference(reference)

    def check(self, candidate: Candidate) -> None:
        """See `nextscale.tune.search.Measurer`."""
        measured = f"speed {self._identify(candidate)} "
        if not any(key.startswith(measured) for key in self.journal):
            pipeline = self.load(candidate.dtype)
            pipeline.sample(config=candidate.change(self.base), **self.give(pipeline, self.config.batch))

    def measure_speed(self, candidate: Candidate, rounds: int, held_out: bool = False) -> float:
        """See `nextscale.tune.search.Measurer`."""
        known = self.rounds.setdefault((candidate.name, held_out), [])
        if len(known) < rounds:
            key = f"speed {self._identify(candidate)} {'held-out ' * held_out}{rounds}"
            missing = rounds - len(known)
            known += self._recall(key, lambda: {"rounds": self._time_rounds(candidate, missing)}).rounds
        return statistics.median(dense / seconds for dense, seconds in known)

    def measure_loss(self, candidate: Candidate, images: int, held_out: bool = False) -> PairedLoss:
        """See `nextscale.tune.search.Measurer`."""

        def compare() -> dict[str, Any]:
            features, dense = (self.extract(c, images, held_out) for c in (candidate, DENSE))
            loss = compare_distances(features, dense, self.references[held_out])
            return {"distance": loss.distance, "baseline": loss.baseline, "error": loss.error}

        found = self._recall(f"loss {self._identify(candidate)} {'held-out ' * held_out}{images}", compare)
        return PairedLoss(found.distance, found.baseline, found.error, images)

    def list_seconds(self, candidate: Candidate, held_out: bool = False) -> tuple[float, float]:
        """Median seconds an image of the dense model and of a candidate, of the rounds so far."""
        dense, own = zip(*self.rounds[candidate.name, held_out], strict=True)
        return statistics.median(dense) / self.config.batch, statistics.median(own) / self.config.batch

    def load(self, dtype: str) -> Pipeline:
        """The model in this type. The dense model's type and the last other one stay in memory."""
        if dtype not in self._pipelines:
            for other in set(self._pipelines) - {DENSE.dtype}:
                del self._pipelines[other]
            self._warm.clear()
            self._pipelines[dtype] = Pipeline.from_pretrained(self.model, dtype=dtype, device=self.device)
        return self._pipelines[dtype]

    def give(self, pipeline: Pipeline, count: int) -> dict[str, Any]:
        """Keywords of `Pipeline.sample` for so many images."""
        if self.given is None:
            return give_classes(pipeline, count, "tuning draws images")
        return self.given.read(range(count))

    def extract(self, candidate: Candidate, images: int, held_out: bool) -> Tensor:
        """Features (images, D) of the candidate's first samples, of which only missing ones are made."""
        settings = candidate.change(self.base)
        settings = replace(settings, seed=(settings.seed + held_out) % 2**63)
        about = self.load(candidate.dtype), self.model, images, settings, self.config.batch
        samples = GrowingSamples(*about) if self.given is None else GrowingConditioned(*about, self.given)
        classes = len(samples.order)
        if classes > self.shard or self.given is not None:  # so that the first images are of random classes
            samples.order = tuple(torch.randperm(classes, generator=make_generator(0, "classes")).tolist())
        name = f"{'held-out-' * held_out}{self._identify(candidate)}"
        return self._extract(samples, self.folder / "features" / name, self.shard)

    def _time_rounds(self, candidate: Candidate, rounds: int) -> list[tuple[float, float]]:
        """Seconds of a batch of the dense model and of the candidate, in turn."""
        pairs = ((self.load(DENSE.dtype), self.base), (self.load(candidate.dtype), candidate.change(self.base)))
        cold = 0 if candidate.name in self._warm else _ROUNDS_OF_GRAPHS if self.device.type == "cuda" else 1
        self._warm.add(candidate.name)
        timed = []
        for turn in range(-cold, rounds):
            took = []
            for pipeline, settings in pairs:
                batch, given = self.config.batch, self.give(pipeline, self.config.batch)
                scales, decode = time_batch(pipeline, batch, settings, clock=self.config.clock, given=given)
                took.append(sum(scales) + decode)
            if turn >= 0:
                timed.append((took[0], took[1]))
        return timed

    def _extract(self, images: MeasuredImages, folder: Path, shard: int, show: bool = False) -> Tensor:
        batch = self.config.batch * max(1, _FEATURE_BATCH // self.config.batch)
        extraction = Extraction([self.network], shard=shard, batch=batch, device=self.device)
        if folder.name not in self._recorded:
            record_extraction(images, extraction, folder)
            self._recorded.add(folder.name)
        extract_features(images, extraction, folder, show=show)
        return read_features(folder, len(images), extraction)[f"{self.network.name}.pool"]

    def _divide_reference(self, reference: MeasuredImages) -> tuple[Tensor, Tensor]:
        """Features of two halves of the reference, each with half of every class: to select by, and held out."""
        features_MD = self._extract(reference, self.folder / "features" / "reference", _REFERENCE_SHARD, show=True)
        half = choose_part(len(features_MD), len(features_MD) // 2, reference.labels())
        held_out = torch.ones(len(features_MD), dtype=torch.bool)
        held_out[half] = False
        return features_MD[half], features_MD[held_out]

    def _read_clock(self) -> float:
        return time.monotonic()

    def _identify(self, candidate: Candidate) -> str:
        """A short checksum of all settings of a candidate."""
        settings = json.dumps(to_dict(candidate.change(self.base)), sort_keys=True)
        return compute_fingerprint({}, f"{candidate.dtype} {settings}")[:10]

    def _recall(self, key: str, measure: Callable[[], dict[str, Any]]) -> Measurement:
        """The measurement of this key: the stored one, or a new one, which is stored."""
        if key not in self.journal:
            began = self._read_clock()
            values = measure()
            self.journal[key] = Measurement(self._read_clock() - began, **values)
            entries = {name: asdict(measurement) for name, measurement in self.journal.items()}
            write_json(self.folder / JOURNAL, add_digest({"measurements": entries}))
        self.seconds += self.journal[key].seconds
        return self.journal[key]
