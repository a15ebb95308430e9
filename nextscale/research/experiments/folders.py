"""Where the parts of an experiment are stored: each folder is named after a checksum of all settings that affect it.

So the rows and the experiments of one scale share what is equal. Nothing is trained or written here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import is_token_cache
from nextscale.research.experiments.entry import Experiment, Row
from nextscale.research.experiments.keys import compute_key, list_changed_settings

_REPOSITORY = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of an experiment: paths, names on the hub, or "train"."""

    data: str
    tokenizer: str
    features: str
    reference: str
    encoder: str = ""
    """Encoder for semantic guidance, where the experiment uses it."""
    model: str = ""
    """A trained generator, used instead of training one."""
    refiner: str = ""
    """A trained generator for the last scales, where the experiment uses one."""


def resolve_model_path(name: str) -> str:
    """The path of a model of the repository (models/...), also from another working folder; other names unchanged."""
    in_repository = name.startswith("models/") and not Path(name).exists() and (_REPOSITORY / name).exists()
    return str(_REPOSITORY / name) if in_repository else name


@dataclasses.dataclass(frozen=True)
class Folders:
    """The folders of an experiment at one scale, whose inputs are given or trained, below `root`."""

    experiment: Experiment
    inputs: Inputs
    root: Path

    def name_classifier(self) -> Path:
        """The classifier that is trained on the data."""
        config = self.experiment.classifier
        assert config is not None, "an entry that trains its feature network has its settings"
        return self.root / f"classifier-{compute_key(self.inputs.data, list_changed_settings(config))}"

    def name_encoder(self, untrained: bool) -> Path:
        """The encoder that is trained on the data without labels, or the untrained one."""
        config = self.experiment.encoder
        assert config is not None, "an entry that trains its encoder has its settings"
        return self.root / f"encoder-{compute_key(self.inputs.data, list_changed_settings(config), untrained)}"

    def name_tokenizer(self, row: Row, seed: int) -> Path:
        """The row's tokenizer, trained on the data."""
        config = dataclasses.replace(row.tokenizer, train=dataclasses.replace(row.tokenizer.train, seed=seed))
        return self.root / f"tokenizer-{compute_key(self.inputs.data, list_changed_settings(config))}"

    def name_cache(self, row: Row, tokenizer: str, encoder: str) -> Path | None:
        """The token cache of the data, with the encoder's features; None where the data themselves are used."""
        views = self.experiment.views
        if not views or is_token_cache(Path(self.inputs.data)):
            return None
        key = compute_key(self.inputs.data, tokenizer, list_changed_settings(row.run.images), views, encoder)
        return self.root / f"cache-{key}"

    @property
    def features(self) -> str:
        """The feature network of the metrics."""
        return str(self.name_classifier()) if self.inputs.features == "train" else self.inputs.features

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the generators."""
        given = self.inputs.tokenizer
        return str(self.name_tokenizer(self.experiment.rows[0], 0)) if given == "train" else given

    @property
    def refiner_row(self) -> Row:
        """A row that trains the model for the last scales."""
        run = self.experiment.refiner
        assert run is not None, "an entry with draft_scales has settings of the refiner's training"
        return dataclasses.replace(self.experiment.rows[0], run=run)

    def trains_encoder(self, row: Row) -> bool:
        """Whether the encoder of the row's guidance is one of the experiment's own."""
        name = row.run.loss.encoder
        return name == "untrained" or (name, self.inputs.encoder) == ("given", "train")

    def find_encoder(self, row: Row) -> str:
        """The encoder of the row's semantic guidance; empty = no guidance, or the features of a given cache."""
        name = row.run.loss.encoder
        if is_token_cache(Path(self.inputs.data)):
            return ""
        if name == "features":
            return self.features
        if self.trains_encoder(row):
            return str(self.name_encoder(name == "untrained"))
        return resolve_model_path(self.inputs.encoder if name == "given" else name)

    def plan_training(self, row: Row, seed: int) -> tuple[RunConfig, Path]:
        """The settings of the row's training, and its folder."""
        encoder = self.find_encoder(row)
        cache = self.name_cache(row, self.tokenizer, encoder)
        data = self.inputs.data if cache is None else str(cache)
        if row.run.loss.encoder and (cache is not None or is_token_cache(Path(data))):
            encoder = "cache"
        loss, train = (
            dataclasses.replace(row.run.loss, encoder=encoder),
            dataclasses.replace(row.run.train, seed=self.experiment.find_training_seed(seed)),
        )
        config: RunConfig = dataclasses.replace(
            row.run, data=data, tokenizer=self.tokenizer, loss=loss, train=train, sampling=row.sampling
        )
        sampling = RunConfig().sampling  # affects the sample pictures, but no weight
        key = compute_key(list_changed_settings(dataclasses.replace(config, sampling=sampling)))
        return config, self.root / f"run-{key}"
