"""An experiment as a file: entries/NAME.yaml, over the common settings of each scale in entries/scales.yaml.

An entry may be `like` another, whose settings at each scale then lie under its own. A row is one line of the table. Its
settings are laid over those of the scale: `run` are settings of `nextscale train`,
`tokenizer` of `nextscale tokenizer train`, `sampling` of `nextscale sample`, `sparsify` of `nextscale sparsify`, which
then makes the row's model of the trained one. The encoder of semantic guidance,
`run.loss.encoder`, may also be one of the names in `ENCODERS`. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig, ClassifierRunConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.files import read_settings, read_yaml
from nextscale.config.parse import from_dict, suggest_name
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.tokenizer_training import TokenizerRunConfig
from nextscale.config.transformer_training import RunConfig

FOLDER = Path(__file__).parent / "entries"
SCALES = ("tiny", "cifar", "paper")
ENCODERS = ("given", "untrained", "features")
"""What --encoder names; the experiment's own encoder as it would start; the feature network that measures."""
_OVERLAYS = ("run", "sampling", "tokenizer", "sparsify", "recipe", "tokenizer_recipe")


@dataclass(frozen=True)
class Row:
    """One line of a table at one scale."""

    name: str
    x: float | None
    """Where it stands on the picture's axis; None: it has a name alone."""
    published: dict[str, float]
    """Figures of the paper by neutral name (distance, score, ...); what is absent was not available."""
    run: RunConfig
    tokenizer: TokenizerRunConfig
    sampling: SampleConfig
    alone: bool = False
    """The refiner is measured, without the row's own model."""
    measured: bool = True
    """False: a line of published figures alone."""
    sparsify: SparsifyConfig | None = None
    """How the trained model is sparsified; None: it is not."""
    flops: float = 0.0
    """The share of the dense FLOPs at which the row is measured: its threshold is found; 0 = as `sampling` says."""


@dataclass(frozen=True)
class Experiment:
    """An entry at one scale, ready to run."""

    name: str
    title: str
    source: str
    """Which paper's table or figure, and where the published figures come from."""
    kind: str
    x_name: str
    figures: tuple[str, ...]
    """Columns, by neutral name."""
    scale: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    images: int
    """How many are measured of each row and seed."""
    needs: dict[str, str]
    """Inputs (data, tokenizer, features, reference) to what they are by default; empty: the user must name one."""
    classifier: ClassifierRunConfig | None
    """Trained first, where no features are named."""
    encoder: EncoderRunConfig | None
    """Likewise for an encoder, and what an untrained one looks like."""
    views: int
    """Of the token cache; 0 = none is made."""
    refiner: RunConfig | None
    """How the model is trained that draws the late scales in rows with `draft_scales`."""
    against: str = ""
    """A figure over which the others are drawn too, as curves; rows whose names differ after the last comma are one."""
    picture: str = ""
    """What is drawn of the trained models beside the table: samples, routing, ...; empty = nothing."""
    note: str = ""


def names() -> list[str]:
    """All experiments."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "scales")


def read_entry(name: str) -> dict[str, Any]:
    """The file of an experiment; UserError with the nearest name when there is none."""
    if name not in names():
        raise UserError(f"there is no experiment '{name}'{suggest_name(name, names())}")
    return read_yaml(FOLDER / f"{name}.yaml")


def load(name: str, scale: str, *, on_cpu: bool = False) -> Experiment:
    """An experiment at a scale. `on_cpu`: in the size for two CPU cores, where the scale has one of its own.

    Raises UserError when there is no such experiment or scale, or a file has a setting that is not known.
    """
    entry = read_entry(name)
    common = read_yaml(FOLDER / "scales.yaml")
    if scale not in SCALES:
        raise UserError(f"there is no scale '{scale}'; known: {', '.join(SCALES)}")
    where = f"experiment {name} at scale {scale}"
    like = [read_entry(entry["like"])] if "like" in entry else []
    shared = [source.get(scale, {}) for source in (common, *like, entry)]
    layers = [layer for source in shared for layer in (source, *([source.get("cpu", {})] if on_cpu else []))]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings |= {key: value for key, value in layer.items() if key not in (*_OVERLAYS, "cpu", "note")}
    note = " ".join(str(layer["note"]) for layer in layers if layer.get("note"))
    rows = tuple(_row(row, layers, scale, where, on_cpu) for row in entry["rows"] if row.get(scale, {}) is not None)
    classifier, encoder = None, settings.get("encoder")
    if "classifier" in settings:
        base = ClassifierRunConfig(classifier=ClassifierConfig())
        classifier = from_dict(ClassifierRunConfig, settings["classifier"], f"{where}: classifier", base)
    if isinstance(encoder, dict):
        encoder = from_dict(EncoderRunConfig, encoder, f"{where}: encoder", EncoderRunConfig())
    elif encoder:
        encoder = read_settings(EncoderRunConfig, Path(encoder))
    refiner = {"name": "refiner", **entry["refiner"]} if "refiner" in entry else None
    guided = any(row.measured and row.run.loss.encoder == "given" for row in rows)
    return Experiment(
        name=name,
        title=entry["title"],
        source=entry["source"],
        kind=entry["kind"],
        x_name=entry.get("x", ""),
        figures=tuple(entry["figures"]),
        scale=scale,
        rows=rows,
        seeds=tuple(settings["seeds"]),
        images=int(settings["images"]),
        needs={name: value for name, value in settings["needs"].items() if name != "encoder" or guided},
        classifier=classifier,
        encoder=encoder,
        views=int(settings.get("views", 0)),
        refiner=_row(refiner, layers, scale, where, on_cpu).run if refiner else None,
        against=entry.get("against", ""),
        picture=entry.get("picture", ""),
        note=note,
    )


def _row(row: dict[str, Any], layers: list[dict[str, Any]], scale: str, where: str, on_cpu: bool) -> Row:
    there = row.get(scale) or {}
    own = [*layers, row, there, there.get("cpu", {}) if on_cpu else {}]
    recipe = next((layer["recipe"] for layer in reversed(own) if "recipe" in layer), None)
    run = read_settings(RunConfig, Path(recipe)) if recipe else RunConfig()
    code_recipe = next((layer["tokenizer_recipe"] for layer in reversed(own) if "tokenizer_recipe" in layer), None)
    codes = read_settings(TokenizerRunConfig, Path(code_recipe)) if code_recipe else TokenizerRunConfig()
    sampling = run.sampling
    for layer in own:
        run = from_dict(RunConfig, layer.get("run", {}), f"{where}: run", run)
        codes = from_dict(TokenizerRunConfig, layer.get("tokenizer", {}), f"{where}: tokenizer", codes)
        sampling = from_dict(SampleConfig, layer.get("sampling", {}), f"{where}: sampling", sampling)
    published = {figure: float(value) for figure, value in row.get("published", {}).items()}  # YAML reads 3e8 as text
    here = row | there  # a smaller model stands in for a published one under its own name
    alone, measured = bool(here.get("alone")), bool(here.get("measured", True))
    return Row(
        here["name"], here.get("at"), published, run, codes, sampling, alone, measured,
        _sparsify(own, where) if here.get("dynamic") else None, float(here.get("flops", 0)),
    )  # fmt: skip


def _sparsify(layers: list[dict[str, Any]], where: str) -> SparsifyConfig:
    config = SparsifyConfig()
    for layer in layers:
        config = from_dict(SparsifyConfig, layer.get("sparsify", {}), f"{where}: sparsify", config)
    return config
