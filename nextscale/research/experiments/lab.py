"""Where the trainings and measurements of an experiment are made and kept.

Each lies in a folder named after a checksum of all that decides it, so rows and experiments of one scale share them.
A training that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from nextscale.checkpoints.native import read_config
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.reading import read_json
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache, is_token_cache
from nextscale.data.datasets import open_dataset
from nextscale.encoders.classifier import is_classifier
from nextscale.evaluation.compute import METRICS, name_metric
from nextscale.evaluation.run import evaluate, make_statistics
from nextscale.info import describe_config, sample_flops
from nextscale.research.experiments.cost import sampling_seconds, training_seconds
from nextscale.research.experiments.dynamic import collect_figures, match_flops, remove_thresholds, sparsify_once
from nextscale.research.experiments.entry import Experiment, Row
from nextscale.research.experiments.keys import decides, key
from nextscale.research.experiments.pictures import Shown, draw
from nextscale.training.classifier import train_classifier
from nextscale.training.encoder import train_encoder
from nextscale.training.tokenize import tokenize
from nextscale.training.tokenizer import evaluate_folder, train_tokenizer
from nextscale.training.transformer import train_transformer

_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an experiment works on."""

    data: str
    tokenizer: str
    features: str
    reference: str
    encoder: str = ""
    """What guides the training, where the experiment guides any."""
    model: str = ""
    """A trained generator in place of a training."""
    refiner: str = ""
    """One for the late scales, where the experiment has a use for it."""


def own_path(name: str) -> str:
    """The path of a model that the repository holds (models/...), also from another working folder."""
    ours = name.startswith("models/") and not Path(name).exists() and (_ROOT / name).exists()
    return str(_ROOT / name) if ours else name


def trained_figures(finished: dict[str, Any], config: ModelConfig) -> dict[str, float]:
    """Figures of a training's last validation: nats per token, of all and of each scale, and how even the load is."""
    if "validation_loss" not in finished:
        return {}
    scales = zip(config.pyramid.sides, finished["validation_loss_per_scale"], strict=True)
    figures = {"validation_loss": finished["validation_loss"]} | {f"nats_{h}x{w}": v for (h, w), v in scales}
    if "validation_guidance" in finished:
        figures["guidance"] = finished["validation_guidance"]
    if "validation_expert_load" in finished:
        load = finished["validation_expert_load"]
        figures |= {f"load_E{j}": v for j, v in enumerate(load, start=1)} | {"load_variance": statistics.variance(load)}
    return figures


class Lab:
    """Where trainings and measurements of one scale are made and kept."""

    def __init__(self, experiment: Experiment, inputs: Inputs, folder: Path, world: World):
        self.experiment, self.folder, self.world = experiment, folder, world
        self.data, self.reference = inputs.data, inputs.reference
        self.features = inputs.features if inputs.features != "train" else self._classifier()
        self.codes, self.model, self.refiner = inputs.tokenizer, inputs.model, inputs.refiner
        self.given_encoder = inputs.encoder

    def _classifier(self) -> str:
        """A classifier of the data, trained once."""
        config = self.experiment.classifier
        assert config is not None, "an entry that trains its feature network says how"
        folder = self.folder / f"classifier-{key(self.data, decides(config))}"
        if not (folder / "finished.json").exists():
            values = train_classifier(config, self.data, folder, self.world)
            self._finish(folder, values)
        assert is_classifier(folder), "training wrote it"
        return str(folder)

    def _own_encoder(self, untrained: bool) -> str:
        """An encoder of the data, trained once without labels, or as it would start."""
        config = self.experiment.encoder
        assert config is not None, "an entry that trains its encoder says how"
        folder = self.folder / f"encoder-{key(self.data, decides(config), untrained)}"
        if not (folder / "finished.json").exists():
            self._finish(folder, train_encoder(config, self.data, folder, self.world, untrained=untrained))
        return str(folder)

    def _encoder(self, row: Row) -> str:
        """What guides a row's training; empty = nothing."""
        name = row.run.loss.encoder
        if name == "features":
            return self.features
        if name == "untrained" or (name, self.given_encoder) == ("given", "train"):
            return self._own_encoder(untrained=name == "untrained")
        return own_path(self.given_encoder if name == "given" else name)

    def _finish(self, folder: Path, values: dict[str, Any]) -> None:
        if self.world.main:
            write_json(folder / "finished.json", values)
        self.world.wait()

    def _trained_tokenizer(self, row: Row, seed: int) -> Path:
        config = dataclasses.replace(row.tokenizer, train=dataclasses.replace(row.tokenizer.train, seed=seed))
        folder = self.folder / f"tokenizer-{key(self.data, decides(config))}"
        if not (folder / "finished.json").exists():
            self._finish(folder, train_tokenizer(config, self.data, folder, self.world))
        return folder

    def _cache(self, row: Row, codes: str, encoder: str) -> str:
        """The data as tokens, and the encoder's features for semantic guidance, made once for all seeds."""
        views, images = self.experiment.views, row.run.images
        if not views or is_token_cache(Path(self.data)):
            return self.data
        folder = self.folder / f"cache-{key(self.data, codes, decides(images), views, encoder)}"
        if not (folder / "finished.json").exists():
            tokenize(self.data, Path(codes), folder, images, 0, self.world, views=views, encoder=encoder)
            self._finish(folder, {})
        return str(folder)

    def _run(self, row: Row, seed: int) -> tuple[Path, dict[str, Any]]:
        """A trained generator of this row, and what its training ended with."""
        if self.model:
            return Path(self.model), {}
        codes = self.codes if self.codes != "train" else str(self._trained_tokenizer(self.experiment.rows[0], 0))
        cached = is_token_cache(Path(self.data))
        encoder = "" if cached else self._encoder(row)
        data = self._cache(row, codes, encoder)
        if row.run.loss.encoder and is_token_cache(Path(data)):
            encoder = "cache"
        loss, train = dataclasses.replace(row.run.loss, encoder=encoder), dataclasses.replace(row.run.train, seed=seed)
        config: RunConfig = dataclasses.replace(
            row.run, data=data, tokenizer=codes, loss=loss, train=train, sampling=row.sampling
        )
        sampling = RunConfig().sampling  # its grid decides no weight
        folder = self.folder / f"run-{key(decides(dataclasses.replace(config, sampling=sampling)))}"
        if not (folder / "finished.json").exists():
            # rows that share a training differ in sampling alone, which must not make their settings differ
            config = dataclasses.replace(config, sampling=remove_thresholds(self.experiment.rows[0].sampling))
            train_transformer(config, folder, self.world)
        self.world.wait()
        return folder, read_json(folder / "finished.json")

    def _refiner(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """The model that draws the late scales, given by the user or trained."""
        if self.refiner:
            return Path(self.refiner), {}
        run = self.experiment.refiner
        assert run is not None, "an entry with draft_scales says how the refiner is trained"
        return self._run(dataclasses.replace(self.experiment.rows[0], run=run), seed)

    def generator(self, row: Row, seed: int) -> dict[str, float]:
        """Figures of a generator: what it costs, its validation, its samples."""
        folder, finished = self._refiner(seed) if row.alone else self._run(row, seed)
        sampling, second = dataclasses.replace(row.sampling, seed=seed), None
        executed = {"flops_share": 1.0} if "flops_share" in self.experiment.figures else {}
        if row.sparsify is not None:
            folder, sampling, executed = self._sparse(row, folder, sampling, seed)
        config, _ = read_config(folder)
        if sampling.draft_scales:
            refiner, _ = self._refiner(seed)
            sampling, (second, _) = dataclasses.replace(sampling, refiner=str(refiner)), read_config(refiner)
        settings = EvaluationConfig(count=self.experiment.images, sampling=sampling)
        figures = self._measured(folder, settings) if settings.count else {}
        return figures | self._costs(row, config, sampling, second) | trained_figures(finished, config) | executed

    def _sparse(
        self, row: Row, dense: Path, sampling: SampleConfig, seed: int
    ) -> tuple[Path, SampleConfig, dict[str, float]]:
        """The row's model made of the dense one, its sampling with the row's threshold, and its figures."""
        assert row.sparsify is not None, "called for rows that are sparsified"
        data = self.data and self._cache(row, str(dense), "") if self.model else read_json(dense / "run.json")["data"]
        folder = sparsify_once(row.sparsify, dense, data, self.folder, self.world)
        unseeded = dataclasses.replace(sampling, seed=0)
        name = key(dataclasses.asdict(unseeded), row.flops)
        sampling = match_flops(folder, unseeded, row.flops, folder / f"thresholds-{name}.json", self.world)
        figures = collect_figures(folder, sampling, folder / f"flops-{name}.json", self.world)
        return folder, dataclasses.replace(sampling, seed=seed), figures

    def cost(self, kept: Path) -> dict[str, list[dict[str, float]]]:
        """Parameters, arithmetic and seconds of all rows, timed side by side once and then `kept`."""
        rows = [row for row in self.experiment.rows if row.measured]
        folders = [self._run(row, self.experiment.seeds[0])[0] for row in rows]
        about = key([str(folder) for folder in folders], describe_machine(self.world.device)["device"])
        if self.world.main and not (kept.exists() and read_json(kept)["about"] == about):
            found = sampling_seconds(folders, rows[0].sampling, self.world)
            for row, folder, figures in zip(rows, folders, found, strict=True):
                figures["seconds_per_epoch"] = training_seconds(folder, self._examples(row, folder))
            write_json(kept, {"about": about, "rows": found})
        self.world.wait()
        return {
            row.name: [self._costs(row, read_config(folder)[0]) | figures]
            for row, folder, figures in zip(rows, folders, read_json(kept)["rows"], strict=True)
        }

    def draw(self, out: Path) -> None:
        """The experiment's picture, once for the same models."""
        jobs = [(row, seed) for row in self.experiment.rows if row.measured for seed in self.experiment.seeds]
        models = [Shown(row.name, self._model(row, seed), row.sampling) for row, seed in jobs]
        about = key([[m.name, str(m.folder), to_dict(m.sampling)] for m in models])
        kept = out / "drawn.json"
        if self.world.main and not (kept.exists() and read_json(kept) == about):
            draw(self.experiment.picture, models, out, str(self.world.device))
            write_json(kept, about)
        self.world.wait()

    def _model(self, row: Row, seed: int) -> Path:
        folder = self._run(row, seed)[0]
        return self._sparse(row, folder, row.sampling, seed)[0] if row.sparsify is not None else folder

    def _examples(self, row: Row, folder: Path) -> int:
        """Training examples in an epoch of a run."""
        data, config = Path(read_json(folder / "run.json")["data"]), read_config(folder)[0]
        if is_token_cache(data):
            return int(TokenCache(data).head["examples"]["train"])
        return len(open_dataset(str(data), config.square_side, row.run.images, self.experiment.seeds[0])[0])

    @staticmethod
    def _costs(
        row: Row, config: ModelConfig, sampling: SampleConfig | None = None, refiner: ModelConfig | None = None
    ) -> dict[str, float]:
        """Parameters, and arithmetic of one image."""
        facts = describe_config(row.name, config)
        gflop = sample_flops(config, sampling or row.sampling, refiner) / 1e9
        counts = {"parameters": facts["transformer_parameters"], "active_parameters": facts["active_parameters"]}
        return counts | {"gflop": gflop}

    def tokenizer(self, row: Row, seed: int) -> dict[str, float]:
        """Figures of a tokenizer: its reconstructions of the reference."""
        folder = self._trained_tokenizer(row, seed)
        report = folder / "report.json"
        if not report.exists() and self.world.main:
            evaluate_folder(folder, self.reference, self.experiment.images, folder)
        self.world.wait()
        measured = self._measured(folder, EvaluationConfig(count=self.experiment.images, reconstruct=self.reference))
        return read_json(report) | measured

    def _statistics(self, side: int) -> str:
        """The reference as statistics for images of this side, made once."""
        if self.reference.endswith(".npz"):
            return self.reference
        path = self.folder / f"reference-{key(self.reference, self.features, side)}.npz"
        if not path.exists():
            make_statistics(self.reference, self.features, path, EvaluationConfig(size=side), self.world)
        self.world.wait()
        return str(path)

    def _measured(self, folder: Path, settings: EvaluationConfig) -> dict[str, float]:
        """Figures of `nextscale evaluate` under neutral names."""
        name = f"measured-{key(dataclasses.asdict(settings), self.features, self.reference)}.json"
        out = (self.folder / f"model-{key(str(folder.resolve()))}" if self.model else folder) / name
        if not out.exists():
            reference = self._statistics(read_config(folder)[0].square_side)
            evaluate(str(folder), out, [self.features], [reference], settings, self.world)
        self.world.wait()
        ((network, found),) = read_json(out)["measures"].items()
        return {m: found[name_metric(m, network)] for m in METRICS if name_metric(m, network) in found} | {
            "network": network
        }
