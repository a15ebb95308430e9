"""Runs the trainings and measurements of an experiment, and stores them.

Each has a folder named after a checksum of all settings that affect it, so rows and experiments of one scale share
them. An interrupted training is resumed.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.native import read_config
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.reading import read_json
from nextscale.common.sizes import Size, shorten_size
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.data.cache import TokenCache, is_token_cache
from nextscale.data.datasets import open_dataset
from nextscale.encoders.classifier import is_classifier
from nextscale.evaluation.compute import METRICS, name_metric
from nextscale.evaluation.flops import count_dense_flops, count_planned_flops
from nextscale.evaluation.run import evaluate, make_statistics
from nextscale.info import count_active_parameters, count_parameters
from nextscale.research.experiments.choosing import note_divergence, read_loss
from nextscale.research.experiments.cost import compute_training_seconds, measure_sampling_seconds
from nextscale.research.experiments.dynamic import (
    collect_metrics,
    match_flops,
    measure_flops,
    remove_thresholds,
    sparsify_once,
)
from nextscale.research.experiments.entry import Experiment, Row
from nextscale.research.experiments.folders import Folders, Inputs
from nextscale.research.experiments.held_out import measure_loss_noise, measure_own_attention
from nextscale.research.experiments.keys import compute_key, compute_key_of_samples, list_changed_settings
from nextscale.research.experiments.ledger import check_experiment_inputs
from nextscale.research.experiments.pictures import OF_TRAININGS, TrainedModel, draw_picture
from nextscale.research.experiments.records import (
    find_kept_model,
    read_costs,
    read_data_name,
    read_finished,
    read_measures,
    read_report,
)
from nextscale.research.experiments.timing import record_measuring, record_training
from nextscale.training.classifier import train_classifier
from nextscale.training.encoder import train_encoder
from nextscale.training.engine.checks import NonFiniteError
from nextscale.training.tokenize import tokenize
from nextscale.training.tokenizer import evaluate_folder, train_tokenizer
from nextscale.training.transformer import train_transformer


def read_training_metrics(finished: dict[str, Any], config: ModelConfig) -> dict[str, float]:
    """Metrics of a training's last validation: loss over all scales and per scale (nats per token), expert load."""
    if "validation_loss" not in finished:
        return {}
    scales = zip(config.pyramid.sides, finished["validation_loss_per_scale"], strict=True)
    metrics = {"validation_loss": finished["validation_loss"]} | {f"nats_{h}x{w}": v for (h, w), v in scales}
    if "validation_guidance" in finished:
        metrics["guidance"] = finished["validation_guidance"]
    if "validation_expert_load" in finished:
        load = finished["validation_expert_load"]
        metrics |= {f"load_E{j}": v for j, v in enumerate(load, start=1)} | {"load_variance": statistics.variance(load)}
    return metrics


def _count_parameters(config: ModelConfig) -> dict[str, float]:
    _, transformer = build_on_meta(config)
    assert transformer is not None, "a generator has a transformer"
    count = count_parameters(transformer)
    return {"parameters": count, "active_parameters": count_active_parameters(config, count)}


class ExperimentRunner:
    """Trains and measures the rows of an experiment at one scale, in one folder."""

    def __init__(self, experiment: Experiment, inputs: Inputs, folder: Path, world: World):
        self.experiment, self.folder, self.world = experiment, folder, world
        self.data, self.reference, self.reading = inputs.data, inputs.reference, experiment.reading
        networks = inputs.tokenizer, inputs.features, inputs.encoder, inputs.model, inputs.refiner
        check_experiment_inputs(folder, (inputs.data, inputs.reference), networks, world, self.reading)
        self.folders, self.features = Folders(experiment, inputs, folder), inputs.features
        if inputs.features == "train":
            self.features = self._train_classifier()
        self.tokenizer, self.model, self.refiner = inputs.tokenizer, inputs.model, inputs.refiner

    def _train_classifier(self) -> str:
        """The folder of a classifier trained on the data."""
        config, folder = self.experiment.classifier, self.folders.name_classifier()
        if not (folder / "finished.json").exists():
            assert config is not None, "name_classifier has asked for it"
            values = train_classifier(config, self.data, folder, self.world)
            self._finish(folder, values)
        assert is_classifier(folder), "training wrote it"
        return str(folder)

    def _train_encoder(self, untrained: bool) -> None:
        """Train an encoder on the data without labels, or write the untrained encoder."""
        config, folder = self.experiment.encoder, self.folders.name_encoder(untrained)
        if not (folder / "finished.json").exists():
            assert config is not None, "name_encoder has asked for it"
            self._finish(folder, train_encoder(config, self.data, folder, self.world, untrained=untrained))

    def _finish(self, folder: Path, values: dict[str, Any]) -> None:
        """Mark a folder as finished."""
        if self.world.main:
            write_json(folder / "finished.json", add_digest(values))
        self.world.wait()

    def _train_tokenizer(self, row: Row, seed: int) -> Path:
        """The folder of the row's tokenizer, trained on the data."""
        config = dataclasses.replace(row.tokenizer, train=dataclasses.replace(row.tokenizer.train, seed=seed))
        folder = self.folders.name_tokenizer(row, seed)
        if not (folder / "finished.json").exists():
            with record_training(folder, main=self.world.main):
                values = train_tokenizer(config, self.data, folder, self.world)
            self._finish(folder, values)
        return folder

    def _tokenize(self, row: Row, tokenizer: str, encoder: str) -> str:
        """The token cache of the data, with the encoder's features; the data itself where no cache is used."""
        folder = self.folders.name_cache(row, tokenizer, encoder)
        if folder is None:
            return self.data
        if not (folder / "finished.json").exists():
            images, views = row.run.images, self.experiment.views
            tokenize(self.data, Path(tokenizer), folder, images, 0, self.world, views=views, encoder=encoder)
            self._finish(folder, {})
        return str(folder)

    def _train_generator(self, row: Row, seed: int) -> tuple[Path, dict[str, Any]]:
        """The folder of the row's generator, trained or given by the user, and its last validation."""
        if self.model:
            return Path(self.model), {}
        if self.tokenizer == "train":
            self._train_tokenizer(self.experiment.rows[0], 0)
        encoder = self.folders.find_encoder(row)
        if encoder and self.folders.trains_encoder(row):
            self._train_encoder(untrained=row.run.loss.encoder == "untrained")
        self._tokenize(row, self.folders.tokenizer, encoder)
        config, folder = self.folders.plan_training(row, seed)
        if not (folder / "finished.json").exists():
            # Rows that share a training differ in sampling; the run's record must be the same for all of them.
            config = dataclasses.replace(config, sampling=remove_thresholds(self.experiment.rows[0].sampling))
            with record_training(folder, main=self.world.main):
                train_transformer(config, folder, self.world)
        self.world.wait()
        return folder, read_finished(folder, len(read_config(folder)[0].pyramid))

    def train_candidate(self, row: Row, seed: int) -> None:
        """Train a row that is judged by its held-out loss, unless that was done; it may diverge."""
        folder = self.folders.plan_training(row, seed)[1]
        if read_loss(folder) is not None:
            return
        try:
            self._train_generator(row, seed)
        except NonFiniteError as error:
            note_divergence(folder, error)
            if self.world.size > 1:  # the others have ended with this error; the next call goes on
                raise

    def _train_refiner(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """The folder of the model for the last scales, trained or given by the user, and its last validation."""
        if self.refiner:
            return Path(self.refiner), {}
        return self._train_generator(self.folders.refiner_row, seed)

    def measure_generator(self, row: Row, seed: int) -> dict[str, float]:
        """The metrics of a generator: of its samples, its cost, its validation."""
        folder, finished = self._train_refiner(seed) if row.refiner_only else self._train_generator(row, seed)
        if self.model:
            return self._measure_model(row, seed, folder, finished)
        with record_measuring(folder, self.experiment.name_measuring(row, seed), main=self.world.main):
            return self._measure_model(row, seed, folder, finished)

    def _measure_model(self, row: Row, seed: int, folder: Path, finished: dict[str, Any]) -> dict[str, float]:
        """The metrics of the trained generator in a folder."""
        run, trained = folder, {}
        if self.experiment.against == "epochs":
            folder, step, finished = find_kept_model(run, row.after)
            trained["epochs"] = step * row.run.train.batch_size / self._count_examples(row, run)
        sampling, refiner_config = dataclasses.replace(row.sampling, seed=seed), None
        executed: dict[str, float] = {}
        if row.sparsify is not None:
            folder, sampling, executed = self._sparsify(row, folder, sampling, seed)
        config, _ = read_config(folder)
        if sampling.draft_scales:
            refiner, _ = self._train_refiner(seed)
            sampling, (refiner_config, _) = dataclasses.replace(sampling, refiner=str(refiner)), read_config(refiner)
        if row.sparsify is None:
            executed = self._count_flops(folder, config, sampling, refiner_config)
            executed = {n: v for n, v in executed.items() if n == "gflop" or n in self.experiment.metrics}
        if "own_attention" in self.experiment.metrics:
            executed |= measure_own_attention(folder, run, self.world)
        evaluation = EvaluationConfig(count=self.experiment.images, sampling=sampling, images=self.reading)
        metrics = self._evaluate(folder, evaluation) if evaluation.count else {}
        validated = {} if row.sparsify is not None else finished  # the validation was the dense model's
        return metrics | _count_parameters(config) | read_training_metrics(validated, config) | executed | trained

    def _count_flops(
        self, folder: Path, config: ModelConfig, sampling: SampleConfig, refiner: ModelConfig | None = None
    ) -> dict[str, float]:
        """{"gflop", "flops_share"} of an image: by the config, or measured where they depend on the tokens."""
        planned = count_planned_flops(config, sampling, refiner)
        if planned is not None:
            dense = count_dense_flops(config, sampling)
            return {"gflop": planned / 1e9, "flops_share": planned / dense}
        unseeded = dataclasses.replace(sampling, seed=0)
        file = self._choose_folder(folder) / f"flops-{compute_key_of_samples(dataclasses.asdict(unseeded))}.json"
        return measure_flops(folder, unseeded, file, self.world)

    def _sparsify(
        self, row: Row, dense: Path, sampling: SampleConfig, seed: int
    ) -> tuple[Path, SampleConfig, dict[str, float]]:
        """The folder of the sparsified model, its sampling settings with the row's threshold, and its metrics."""
        assert row.sparsify is not None, "called for rows that are sparsified"
        given = self.data and self._tokenize(row, str(dense), "") if self.model else ""
        data = given if self.model else read_data_name(dense)
        folder = sparsify_once(row.sparsify, dense, data, self.folder, self.world)
        unseeded = dataclasses.replace(sampling, seed=0)
        name = compute_key_of_samples(dataclasses.asdict(unseeded), row.flops)
        sampling = match_flops(folder, unseeded, row.flops, folder / f"thresholds-{name}.json", self.world)
        metrics = collect_metrics(folder, sampling, folder / f"flops-{name}.json", self.world)
        return folder, dataclasses.replace(sampling, seed=seed), metrics

    def measure_cost(self, file: Path) -> dict[str, list[dict[str, float]]]:
        """Parameters, FLOPs and seconds of all rows; the seconds are measured once and stored in `file`."""
        rows = [row for row in self.experiment.rows if row.measured]
        found = [self._prepare_timing(row) for row in rows]
        models = [(folder, sampling) for folder, sampling, _ in found]
        what = [[str(folder), to_dict(sampling)] for folder, sampling in models]
        key = compute_key(what, describe_machine(self.world.device)["device"])
        if self.world.main and not (file.exists() and read_costs(file, len(rows)).about == key):
            measured = measure_sampling_seconds(models, self.world)
            for row, (folder, _), seconds in zip(rows, models, measured, strict=True):
                if "seconds_per_epoch" in self.experiment.metrics:
                    seconds["seconds_per_epoch"] = compute_training_seconds(folder, self._count_examples(row, folder))
            write_json(file, add_digest({"about": key, "rows": measured}))
        self.world.wait()
        return {
            row.name: [costs | seconds]
            for row, (_, _, costs), seconds in zip(rows, found, read_costs(file, len(rows)).rows, strict=True)
        }

    def _prepare_timing(self, row: Row) -> tuple[Path, SampleConfig, dict[str, float]]:
        """The folder of the row's model, its settings of sampling, its parameters and the FLOPs of an image."""
        seed = self.experiment.seeds[0]
        folder, sampling = self._train_generator(row, seed)[0], row.sampling
        if row.sparsify is not None:
            folder, sampling, costs = self._sparsify(row, folder, sampling, seed)
        config, _ = read_config(folder)
        if row.sparsify is None:
            costs = self._count_flops(folder, config, sampling)
        return folder, sampling, _count_parameters(config) | costs

    def measure_noise(self, row: Row, values: list[dict[str, Any]]) -> dict[str, float]:
        """Standard deviation of each metric of a row's only training: of samples over `values`, those of all seeds of
        sampling, of held-out losses over resamples of the images."""
        of_samples = [m for m in self.experiment.metrics if m in METRICS and m in values[0]]
        noise = {m: statistics.stdev(seed[m] for seed in values) for m in of_samples}
        if row.sparsify is not None:
            return noise
        run = self.folders.plan_training(row, self.experiment.seeds[0])[1]
        return measure_loss_noise(run, run, row.run.validation_images, self.world) | noise

    def draw_pictures(self, out: Path) -> None:
        """Draw the experiment's pictures of models, unless they were drawn of the same models."""
        pictures = [picture for picture in self.experiment.pictures if picture not in OF_TRAININGS]
        if not pictures:
            return
        jobs = [(row, seed) for row in self.experiment.rows if row.measured for seed in self.experiment.seeds]
        models = [TrainedModel(row.name, self._train_model(row, seed), row.sampling) for row, seed in jobs]
        key = compute_key_of_samples(pictures, [[m.name, str(m.folder), to_dict(m.sampling)] for m in models])
        record = out / "drawn.json"
        if self.world.main and not (record.exists() and read_json(record) == key):
            for picture in pictures:
                draw_picture(picture, models, out, str(self.world.device))
            write_json(record, key)
        self.world.wait()

    def list_trainings(self) -> dict[str, list[Path]]:
        """The folders of each row's trainings in the order of the seeds, of the reference row first; of rows that share
        them the first one."""
        rows: dict[str, list[Path]] = {}
        for row in (self.experiment.find_reference(), *self.experiment.rows):
            if row.measured and not row.refiner_only:
                folders = [self.folders.plan_training(row, seed)[1] for seed in self.experiment.seeds]
                if folders not in rows.values():
                    rows[row.name] = folders
        return rows

    def _train_model(self, row: Row, seed: int) -> Path:
        """The folder of the row's model, sparsified where the row says so."""
        folder = self._train_generator(row, seed)[0]
        return self._sparsify(row, folder, row.sampling, seed)[0] if row.sparsify is not None else folder

    def _count_examples(self, row: Row, folder: Path) -> int:
        """Training examples in an epoch of a run."""
        data, config = Path(read_data_name(folder)), read_config(folder)[0]
        if is_token_cache(data):
            return int(TokenCache(data).head["examples"]["train"])
        return len(open_dataset(str(data), config.image_size, row.run.images, self.experiment.seeds[0])[0])

    def measure_tokenizer(self, row: Row, seed: int) -> dict[str, float]:
        """The metrics of a tokenizer's reconstructions of the reference."""
        folder = self._train_tokenizer(row, seed)
        with record_measuring(folder, self.experiment.name_measuring(row, seed), main=self.world.main):
            report = folder / "report.json"
            if not report.exists() and self.world.main:
                evaluate_folder(folder, self.reference, self.experiment.images, folder, self.reading)
            self.world.wait()
            evaluation = EvaluationConfig(count=self.experiment.images, reconstruct=self.reference, images=self.reading)
            return read_report(report) | self._evaluate(folder, evaluation)

    def _make_statistics(self, size: Size) -> str:
        """The file with the reference's statistics for images of this size."""
        if self.reference.endswith(".npz"):
            return self.reference
        read = [changed] if (changed := list_changed_settings(self.reading)) else []
        path = self.folder / f"reference-{compute_key(self.reference, self.features, size, *read)}.npz"
        if not path.exists():
            make_statistics(
                self.reference, self.features, path, EvaluationConfig(size=size, images=self.reading), self.world
            )
        self.world.wait()
        return str(path)

    def _choose_folder(self, model: Path) -> Path:
        """Where what is measured of a model is stored: its folder, unless the user gave the model."""
        return self.folder / f"model-{compute_key(str(model.resolve()))}" if self.model else model

    def _evaluate(self, folder: Path, config: EvaluationConfig) -> dict[str, float]:
        """The metrics of `nextscale evaluate`, named independently of the feature network."""
        settings = dataclasses.asdict(config), self.features, self.reference
        # of reconstructions, earlier versions took the first images
        key = compute_key(*settings, "a part is drawn") if config.reconstruct else compute_key_of_samples(*settings)
        out = self._choose_folder(folder) / f"measured-{key}.json"
        if not out.exists():
            reference = self._make_statistics(shorten_size(read_config(folder)[0].image_size))
            evaluate(str(folder), out, [self.features], [reference], config, self.world)
        self.world.wait()
        network, report = read_measures(out)
        names = {metric: name_metric(metric, network) for metric in METRICS}
        return {metric: report[name] for metric, name in names.items() if name in report} | {"network": network}
