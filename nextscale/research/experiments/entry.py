"""Reads an experiment from entries/NAME.yaml and the common settings of each scale in entries/scales.yaml.

A row is one line of the table. Its settings override those of the scale: `run` holds settings of `nextscale train`,
`tokenizer` of `nextscale tokenizer train`, `sampling` of `nextscale sample`, `sparsify` of `nextscale sparsify`, which
is then applied to the trained model. The encoder of semantic guidance, `run.loss.encoder`, may be one of the names in
`ENCODERS`. An entry that is `like` another inherits that entry's settings at each scale. Needs no torch.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nextscale.common.errors import UserError
from nextscale.common.reading_yaml import read_yaml
from nextscale.config.classifier import ClassifierConfig, ClassifierRunConfig
from nextscale.config.data import ReadConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.files import read_settings
from nextscale.config.parse import from_dict, suggest_name
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.tokenizer_training import TokenizerRunConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.research.experiments.keys import list_changed_settings

FOLDER = Path(__file__).parent / "entries"
SCALES = ("tiny", "cifar", "paper")
ENCODERS = ("given", "untrained", "features", "pixels")
"""The encoder of --encoder; the experiment's encoder before training; the feature network of the metrics; pixels."""
_Config = TypeVar("_Config", RunConfig, TokenizerRunConfig, SparsifyConfig, ClassifierRunConfig, EncoderRunConfig)
_LAYERED = ("run", "sampling", "tokenizer", "sparsify", "recipe", "tokenizer_recipe")


@dataclass(frozen=True)
class Row:
    """One line of a table at one scale."""

    name: str
    x: float | None
    """Position on the x axis of the plot; None: the axis shows the name."""
    published: dict[str, float]
    """The paper's values by metric (distance, score, ...), where available."""
    run: RunConfig
    tokenizer: TokenizerRunConfig
    sampling: SampleConfig
    refiner_only: bool = False
    """Measure the refiner instead of the row's model."""
    measured: bool = True
    """False: the row has published values only."""
    sparsify: SparsifyConfig | None = None
    """How the trained model is sparsified; None: it stays dense."""
    flops: float = 0.0
    """Measure the row at this share of the dense FLOPs, by searching the threshold; 0 = use that of `sampling`."""
    after: float = 1.0
    """Measure the model that the training kept after about this share of its steps (`train.model_every`)."""


@dataclass(frozen=True)
class Choice:
    """Settings of `nextscale train` that are chosen for each row by the held-out loss, see choosing.py."""

    values: dict[str, tuple[Any, ...]]
    """By the setting's name, such as run.train.learning_rate."""
    seeds: tuple[int, ...]
    """Of the trainings that are judged; none of the reported ones."""
    of_first_row: bool = False
    """Choose by the first row alone, for all rows."""

    def list_settings(self) -> list[dict[str, Any]]:
        """All combinations of the values."""
        return [dict(zip(self.values, values, strict=True)) for values in itertools.product(*self.values.values())]

    def apply(self, row: Row, settings: dict[str, Any]) -> Row:
        """The row with these settings. Raises UserError for a setting or a value that cannot be."""
        run = row.run
        for name, value in settings.items():
            changed = value
            for part in reversed(name.split(".")[1:]):
                changed = {part: changed}
            run = from_dict(RunConfig, changed, f"choose: {name}", run)
        return replace(row, run=run)


@dataclass(frozen=True)
class Experiment:
    """An entry at one scale, ready to run."""

    name: str
    title: str
    source: str
    """The paper's table or figure, and the source of the published values."""
    kind: str
    """generator, tokenizer or cost: what a row measures."""
    x_name: str
    metrics: tuple[str, ...]
    """Columns of the table."""
    scale: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    images: int
    """Images measured for each row and seed."""
    needs: dict[str, str]
    """Default of each input (data, tokenizer, features, reference); empty: the user must give it."""
    classifier: ClassifierRunConfig | None
    """The feature network to train, where none is given."""
    encoder: EncoderRunConfig | None
    """The encoder to train, where none is given, or to use untrained."""
    views: int
    """Views of the token cache; 0 = train on images without a cache."""
    refiner: RunConfig | None
    """The training of the model that generates the last scales in rows with `draft_scales`."""
    against: str = ""
    """A metric for the x axis of curves.png; rows that have the same name up to the last comma form one line.
    `epochs` is that of each row's model."""
    pictures: tuple[str, ...] = ()
    """Pictures of the trained models besides the table: samples, routing, progress, ..."""
    note: str = ""
    against_row: str = ""
    """The row that others are compared with, seed by seed; empty = the first one that is measured."""
    choice: Choice | None = None
    """What is chosen for each row before its seeds are trained."""
    reading: ReadConfig = field(default_factory=ReadConfig)
    """How data sets are read."""
    one_training: bool = False
    """Measure one training, of the first seed, with all seeds of sampling: how noisy the metrics are."""

    def find_training_seed(self, seed: int) -> int:
        """The seed of the training that is measured with this seed; those to choose settings by have their own."""
        return self.seeds[0] if self.one_training and seed in self.seeds else seed

    def name_measuring(self, row: Row, seed: int) -> str:
        """The name under which a training's folder records the time of measuring a row with a seed."""
        return f"{self.name}: {row.name}" + (f", seed {seed}" if self.one_training else "")

    def find_reference(self) -> Row:
        """The row that others are compared with. UserError where there is none of the name."""
        for row in self.rows:
            if row.measured and self.against_row in ("", row.name):
                return row
        raise UserError(f"experiment {self.name} at scale {self.scale} measures no row '{self.against_row}'")


def list_experiments() -> list[str]:
    """The names of all experiments."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "scales")


def read_entry(name: str) -> dict[str, Any]:
    """The content of an experiment's file; UserError with the most similar name when there is none."""
    if name not in list_experiments():
        raise UserError(f"there is no experiment '{name}'{suggest_name(name, list_experiments())}")
    return _read_file(name)


def load_experiment(name: str, scale: str, *, on_cpu: bool = False) -> Experiment:
    """An experiment at a scale. `on_cpu`: at the reduced size for two CPU cores, where the scale has one.

    Raises UserError for an unknown experiment, scale or setting.
    """
    entry = read_entry(name)
    common = _read_file("scales")
    if scale not in SCALES:
        raise UserError(f"there is no scale '{scale}'; known: {', '.join(SCALES)}")
    where = f"experiment {name} at scale {scale}"
    like = [read_entry(entry["like"])] if "like" in entry else []
    shared = [source.get(scale, {}) for source in (common, *like, entry)]
    layers = [layer for source in shared for layer in (source, *([source.get("cpu", {})] if on_cpu else []))]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings |= {key: value for key, value in layer.items() if key not in (*_LAYERED, "cpu", "note")}
    note = " ".join(str(layer["note"]) for layer in layers if layer.get("note"))
    rows = tuple(
        _parse_row(row, layers, scale, where, on_cpu) for row in entry["rows"] if row.get(scale, {}) is not None
    )
    classifier, encoder = None, settings.get("encoder")
    if "classifier" in settings:
        base = ClassifierRunConfig(classifier=ClassifierConfig())
        classifier = from_dict(ClassifierRunConfig, settings["classifier"], f"{where}: classifier", base)
    if isinstance(encoder, dict):
        encoder = from_dict(EncoderRunConfig, encoder, f"{where}: encoder", EncoderRunConfig())
    elif encoder:
        encoder = _read_recipe(EncoderRunConfig, encoder)
    refiner = {"name": "refiner", **entry["refiner"]} if "refiner" in entry else None
    guided = any(row.measured and row.run.loss.encoder == "given" for row in rows)
    return Experiment(
        name=name,
        title=entry["title"],
        source=entry["source"],
        kind=entry["kind"],
        x_name=entry.get("x", ""),
        metrics=tuple(entry["figures"]),
        scale=scale,
        rows=rows,
        seeds=tuple(settings["seeds"]),
        images=int(settings["images"]),
        needs={name: value for name, value in settings["needs"].items() if name != "encoder" or guided},
        classifier=classifier,
        encoder=encoder,
        views=int(settings.get("views", 0)),
        refiner=_parse_row(refiner, layers, scale, where, on_cpu).run if refiner else None,
        against=entry.get("against", ""),
        pictures=(entry["picture"],) if isinstance(entry.get("picture"), str) else tuple(entry.get("picture", ())),
        note=note,
        against_row=entry.get("against_row", ""),
        choice=_parse_choice(settings, rows, where) if settings.get("choose") else None,
        one_training=bool(entry.get("one_training")),
    )


def replace_reading(experiment: Experiment, reading: ReadConfig) -> Experiment:
    """The experiment with all its data sets read as `reading` says; settings of an entry stay where it has defaults."""
    changed = list_changed_settings(reading)

    def change(config: _Config) -> _Config:
        return replace(config, images=replace(config.images, **changed))

    rows = tuple(
        replace(
            row,
            run=change(row.run),
            tokenizer=change(row.tokenizer),
            sparsify=None if row.sparsify is None else change(row.sparsify),
        )
        for row in experiment.rows
    )
    return replace(
        experiment,
        rows=rows,
        reading=reading,
        classifier=experiment.classifier and change(experiment.classifier),
        encoder=experiment.encoder and change(experiment.encoder),
        refiner=experiment.refiner and change(experiment.refiner),
    )


def _parse_row(row: dict[str, Any], layers: list[dict[str, Any]], scale: str, where: str, on_cpu: bool) -> Row:
    """A row with the settings of all layers, later ones first."""
    at_scale = row.get(scale) or {}
    layers = [*layers, row, at_scale, at_scale.get("cpu", {}) if on_cpu else {}]
    recipe = _find_setting(layers, "recipe")
    run = _read_recipe(RunConfig, recipe) if recipe else RunConfig()
    tokenizer_recipe = _find_setting(layers, "tokenizer_recipe")
    tokenizer = _read_recipe(TokenizerRunConfig, tokenizer_recipe) if tokenizer_recipe else TokenizerRunConfig()
    sampling = run.sampling
    for layer in layers:
        run = from_dict(RunConfig, layer.get("run", {}), f"{where}: run", run)
        tokenizer = from_dict(TokenizerRunConfig, layer.get("tokenizer", {}), f"{where}: tokenizer", tokenizer)
        sampling = from_dict(SampleConfig, layer.get("sampling", {}), f"{where}: sampling", sampling)
    published = {metric: float(value) for metric, value in row.get("published", {}).items()}  # YAML reads 3e8 as text
    merged = row | at_scale  # a scale may replace a published model by a smaller one with another name
    return Row(
        merged["name"], merged.get("at"), published, run, tokenizer, sampling,
        bool(merged.get("alone")), bool(merged.get("measured", True)),
        _parse_sparsify(layers, where) if merged.get("dynamic") else None, float(merged.get("flops", 0)),
        float(merged.get("after", 1)),
    )  # fmt: skip


def _parse_choice(settings: dict[str, Any], rows: tuple[Row, ...], where: str) -> Choice:
    """`choose` of a scale: {settings: {run.NAME: [values]}, seeds: [...], of_first_row: false}."""
    given = settings["choose"]
    unknown = sorted(set(given) - {"settings", "seeds", "of_first_row"})
    values = {name: tuple(listed) for name, listed in given.get("settings", {}).items()}
    if unknown or not values or not all(name.startswith("run.") and listed for name, listed in values.items()):
        raise UserError(f"{where}: choose takes settings, such as {{run.train.clip: [1, 2]}}, seeds and of_first_row")
    choice = Choice(values, tuple(given.get("seeds", ())), bool(given.get("of_first_row")))
    shared = sorted(set(choice.seeds) & set(settings["seeds"]))
    if shared or not choice.seeds:
        raise UserError(f"{where}: choose needs seeds of its own, which are not reported; got {list(choice.seeds)}")
    for candidate in choice.list_settings():
        choice.apply(rows[0], candidate)
    return choice


@functools.cache
def _read_file(name: str) -> dict[str, Any]:
    """A file of this folder, read once; callers must not change it."""
    return read_yaml(FOLDER / f"{name}.yaml")


@functools.cache
def _read_recipe(kind: type[_Config], name: str) -> _Config:
    """The settings of a recipe, read once for all rows."""
    return read_settings(kind, Path(name))


def _find_setting(layers: list[dict[str, Any]], name: str) -> str | None:
    """The setting of the last layer that has it."""
    return next((layer[name] for layer in reversed(layers) if name in layer), None)


def _parse_sparsify(layers: list[dict[str, Any]], where: str) -> SparsifyConfig:
    config = SparsifyConfig()
    for layer in layers:
        config = from_dict(SparsifyConfig, layer.get("sparsify", {}), f"{where}: sparsify", config)
    return config
