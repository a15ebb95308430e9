"""Write the card of a model: README.md in its folder, from what lies in the folder.

The card is metadata of the Hugging Face hub, a text, and a last line, MARKER. What a person writes below that line
stays when the card is written again, and so do fields of the metadata that are not ours. A README.md without the line
is a person's, and is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nextscale.cards.file import MARKER, explain_foreign_card
from nextscale.cards.licences import describe_licence, name_licence
from nextscale.cards.model import CardModel, read_model
from nextscale.cards.reports import Figures, find_figures
from nextscale.cards.text import Content, write_text
from nextscale.cards.training import Training, read_training
from nextscale.common import files
from nextscale.common.contents import CARD
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_bytes
from nextscale.common.reading import read_text
from nextscale.config.parse import from_dict
from nextscale.config.sampling import SampleConfig

_LARGEST = 2**20
_TASKS = {
    "generator": ("unconditional-image-generation", "image generation"),
    "tokenizer": ("image-to-image", "image reconstruction"),
    "classifier": ("image-classification", "image classification"),
    "encoder": ("image-feature-extraction", "image features"),
}
_PICTURES = {
    "generator": ("samples.png",), "tokenizer": ("reconstructions.png", "*/reconstructions.png"),
    "classifier": (), "encoder": (),
}  # fmt: skip


@dataclass(frozen=True)
class Existing:
    """A card that nextscale wrote before."""

    metadata: dict[str, Any] = field(default_factory=dict)
    below: str = "\n"
    """A person's text below the marker."""

    @property
    def table(self) -> dict[str, Any]:
        """What the card says about itself: `weights`, `training`, `pictures` and, where the hub has no name for it, the
        `licence`."""
        table = self.metadata.get("nextscale")
        return table if isinstance(table, dict) else {}

    @property
    def licence(self) -> str:
        """The licence as it was stated."""
        stated = self.table.get("licence") or self.metadata.get("license_name") or self.metadata.get("license")
        return str(stated or "")

    def read_training(self) -> Training:
        """The facts of training that it carries."""
        try:
            return from_dict(Training, self.table.get("training", {}), "nextscale.training")
        except UserError:  # edited by hand, or of a later version
            return Training()


def read_card(folder: Path) -> Existing | None:
    """The card in a folder; None where there is none. UserError for a README.md that nextscale did not write, and for
    metadata that cannot be read."""
    from huggingface_hub import ModelCard

    path = folder / CARD
    if not path.exists():
        return None
    text = read_text(path, _LARGEST)
    if MARKER not in text:
        raise UserError(explain_foreign_card(path))
    head, _, below = text.partition(MARKER)
    try:
        metadata = ModelCard(head, ignore_metadata_errors=True).data.to_dict() if head.strip() else {}
    except Exception as error:  # yaml's errors, and those of huggingface_hub's checks
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its metadata between the lines `---` cannot be read: {reason[:300]}") from error
    return Existing(metadata, below)


def read_any_card(folder: Path) -> Existing:
    """The card in a folder; an empty one where there is none that can be read."""
    try:
        return read_card(folder) or Existing()
    except UserError:
        return Existing()


def write_card(
    folder: Path, *, name: str = "", licence: str = "", data: Sequence[str] = (), training: Training | None = None,
    overwrite: bool = False, verify: bool = True,
) -> list[str]:  # fmt: skip
    """Write README.md of a model's folder; return notes on what was left out, and why.

    `name`: what the model is called in the lines that use it (the folder). `licence` and `data` (names of data sets on
    the hub): what a person states; those of an earlier card are kept. `training`: facts in place of those that the
    folder records. `overwrite`: replace a README.md that nextscale did not write. `verify`: compare the weights with
    their digests. Raises UserError as `read_model` and `read_card`.
    """
    model = read_model(folder, verify=verify)
    before = read_any_card(folder) if overwrite else read_card(folder) or Existing()
    notes = list[str]()
    if training is None:
        training, notes = find_training(folder, model, before)
    figures, left_out = find_figures(folder, model)
    pictures = find_pictures(folder, model, before)
    stale = [f"left out of the card: {folder / name} shows what earlier weights gave" for name in pictures.stale]
    licence = name_licence(licence or before.licence)
    datasets = list(data) or _list_names(before.metadata.get("datasets"))
    training = replace(training, datasets=tuple(datasets)) if datasets else training
    content = Content(
        model,
        name or str(folder),
        training,
        figures,
        list(pictures.shown),
        _choose_settings(training, figures),
        licence,
        bool(before.below.strip()),
    )
    metadata = _describe(content, before, pictures)
    files.write_text(
        folder / CARD, f"---\n{metadata}\n---\n\n{write_text(content)}\n\n{MARKER}{before.below or chr(10)}"
    )
    return notes + left_out + stale


def find_training(folder: Path, model: CardModel, card: Existing) -> tuple[Training, list[str]]:
    """What the folder records of the training, else what its card carries; and notes on damaged records."""
    training, notes = read_training(folder, model.kind)
    same = card.table.get("weights") == model.digests
    carried = card.read_training()
    if training == Training():
        training = replace(carried, changed=carried.changed or not same) if carried != Training() else training
    elif same and carried.changed:
        training = replace(training, changed=True)
    return training, notes


@dataclass(frozen=True)
class Pictures:
    """{picture: digest} in a model's folder."""

    shown: dict[str, str]
    stale: dict[str, str]
    """Those that show what earlier weights gave."""


def find_pictures(folder: Path, model: CardModel, card: Existing) -> Pictures:
    """The first picture of samples or reconstructions, and those that a card had when the folder had other weights."""
    stale = _read_digests(card.table.get("stale_pictures"))
    if card.table.get("weights") != model.digests:
        stale |= _read_digests(card.table.get("pictures"))
    paths = [path for pattern in _PICTURES[model.kind] for path in sorted(folder.glob(pattern))]
    found = {path.relative_to(folder).as_posix(): fingerprint_bytes(path.read_bytes()) for path in paths}
    fresh = [name for name, digest in found.items() if stale.get(name) != digest]
    shown = {name: found[name] for name in fresh[:1]}
    return Pictures(shown, {name: digest for name, digest in found.items() if name not in fresh})


def _read_digests(table: Any) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in table.items()} if isinstance(table, dict) else {}


def _choose_settings(training: Training, figures: Sequence[Figures]) -> SampleConfig:
    """Settings of the lines that sample: those of the figures, else of the run's grids, else the defaults."""
    measured = [found.sampling for found in figures if found.sampling is not None]
    try:
        chosen = measured[0] if measured else from_dict(SampleConfig, training.sampling, "sampling")
    except UserError:
        return SampleConfig()
    return SampleConfig() if chosen.refiner else chosen


def _describe(content: Content, card: Existing, pictures: Pictures) -> str:
    """The metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    model, training = content.model, content.training
    task, task_name = _TASKS[model.kind]
    results = [
        EvalResult(
            task_type=task, task_name=task_name, dataset_type=found.data or "unknown",
            dataset_name=found.data or "unknown", metric_type=name, metric_name=name,
            metric_value=float(f"{value:.6g}"), metric_args=found.settings,
        )
        for found in content.figures for name, value in found.values.items()
    ]  # fmt: skip
    ours = {"library_name", "pipeline_tag", "tags", "license", "license_name", "datasets", "model-index", "nextscale"}
    kept = {name: value for name, value in card.metadata.items() if name not in ours}
    licence = describe_licence(content.licence)
    table: dict[str, Any] = {"weights": model.digests, "training": training.to_table()}
    table |= {"pictures": pictures.shown, "stale_pictures": pictures.stale}
    table["licence"] = content.licence if "license_name" in licence else ""
    fields: dict[str, Any] = {
        "library_name": "nextscale",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys([*_list_tags(model), *_list_names(card.metadata.get("tags"))])),
        **licence,
        "datasets": list(training.datasets) or None,
        **({"model_name": content.title, "eval_results": results} if results else {}),
        "nextscale": {name: value for name, value in table.items() if value},
        **kept,
    }
    return ModelCardData(**fields).to_yaml().strip()


def _list_names(value: Any) -> list[str]:
    """A list of names in the metadata, which may be one name or none."""
    return [value] if isinstance(value, str) else [str(name) for name in value or ()]


def _list_tags(model: CardModel) -> list[str]:
    tags = ["nextscale"]
    network = model.config.transformer if model.config else None
    if network is not None:
        tags += ["image-generation", "visual-autoregressive-modeling", "next-scale-prediction"]
        mixers = {name for block in range(network.depth) for name in network.block_mixers(block)}
        tags += ["mamba"] * ("mamba" in mixers) + ["mixture-of-experts"] * (network.experts.router != "none")
        tags += ["dynamic-experts"] * (network.dynamic.experts > 0) + ["int8"] * model.is_int8
    return tags + (["image-tokenizer"] if model.kind == "tokenizer" else [])
