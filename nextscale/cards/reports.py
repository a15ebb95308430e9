"""Figures of a card: from reports of `evaluate` and its kin in the model's folder that measured these weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.cards.model import CardModel, Kind
from nextscale.cards.training import shorten
from nextscale.common.digest import check_digest
from nextscale.common.errors import UserError
from nextscale.common.reading import read_json
from nextscale.config.parse import from_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.usage import list_settings

_NO_REPORTS = frozenset(("training", "stages", "samples", "profiles", "best", "tensorboard", "wandb"))
"""Folders in a run that hold no reports about its model."""


@dataclass(frozen=True)
class Figures:
    """What one report measured with one network."""

    file: str
    """The report, relative to the model's folder."""
    values: dict[str, float]
    data: str
    """The images that were measured, or compared with."""
    about: str
    """How it was measured, as a sentence."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The same for machines."""
    sampling: SampleConfig | None = None
    """Settings of the samples that were measured."""


def find_figures(folder: Path, model: CardModel) -> tuple[list[Figures], list[str]]:
    """The figures of all reports in a folder, or in a folder in it, that measured these weights; and a note on each
    report that is left out, with the reason."""
    figures: list[Figures] = []
    notes: list[str] = []
    for path in list_reports(folder):
        try:
            table = read_json(path)
            reader = _find_reader(table, model.kind)
            if reader is None:
                continue
            check_digest(path, table)
            _check_weights(path, table, model)
            figures += reader(path.relative_to(folder).as_posix(), table)
        except UserError as error:
            notes.append(f"left out of the card: {error}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            notes.append(f"left out of the card: {path} is no report that this nextscale can read ({error!r})")
    return figures, notes


def list_reports(folder: Path) -> Iterator[Path]:
    """JSON files that may be reports: those in a folder and in the folders in it."""
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*/*.json")):
        inner = path.relative_to(folder).parts[:-1]
        if inner and (inner[0] in _NO_REPORTS or inner[0].endswith(".work") or inner[0].startswith(".")):
            continue
        if path.name not in ("config.json", "run.json", "inputs.json", "finished.json", "evaluation.json"):
            yield path


def _check_weights(path: Path, table: dict[str, Any], model: CardModel) -> None:
    """Raise UserError unless the report measured the weights of this model."""
    measured = table.get("model_weights")
    if not isinstance(measured, dict) or not measured:
        raise UserError(
            f"{path} does not say which weights it measured: it is about something else, or an earlier version wrote "
            "it; measure again"
        )
    if any(model.digests.get(name) != digest for name, digest in measured.items()):
        raise UserError(f"{path} measured other weights than those in {model.folder}; measure again")


Reader = Callable[[str, dict[str, Any]], list[Figures]]


def _find_reader(table: Any, kind: Kind) -> Reader | None:
    """What reads a report of this content about a model of this kind; None for other tables."""
    readers: list[tuple[set[str], set[Kind], Reader]] = [
        ({"source", "protocol", "measures"}, {"generator", "tokenizer"}, _read_evaluation),
        ({"reconstruction_psnr_db", "generated_images"}, {"generator"}, _read_quickstart),
        ({"psnr_db", "codebook", "usage_per_scale"}, {"generator", "tokenizer"}, _read_tokenizer),
        ({"accuracy", "loss", "data", "images"}, {"classifier"}, _read_classifier),
        ({"knn_accuracy", "data", "test"}, {"encoder"}, _read_encoder),
    ]
    if not isinstance(table, dict):
        return None
    return next((reader for keys, kinds, reader in readers if keys <= set(table) and kind in kinds), None)


def _read_evaluation(file: str, table: dict[str, Any]) -> list[Figures]:
    """A report of `nextscale evaluate`: figures of each feature network, and distances in pairs."""
    protocol, machine = table["protocol"], table.get("machine", {})
    sampling = from_dict(SampleConfig, protocol["sampling"], file) if "sampling" in protocol else None
    made, settings = "samples", dict[str, Any]()
    if sampling is not None:
        settings = {"sampling": {n: list(v) if isinstance(v, tuple) else v for n, v in list_settings(sampling).items()}}
        settings["type"] = protocol.get("compute_dtype", "")
        words = ", ".join(f"{name} {_show(value)}" for name, value in list_settings(sampling).items())
        made = f"samples ({words}, {settings['type']})"
    elif "reconstructed by" in protocol:
        made = "reconstructions"
    found = []
    for network, measures in table["measures"].items():
        values = {name: value for name, value in measures.items() if isinstance(value, float)}
        values = {n: v for n, v in values.items() if v or not n.endswith("_deviation")}  # 0: there is one split
        reference = measures.get("reference", {})
        compared = shorten(reference.get("from") or measures.get("against"))
        about = f"{measures['images']:,} {made}"
        if reference:
            count = reference["images"]
            about += f" compared with {f'{count:,}' if isinstance(count, int) else 'unknown many'} images"
            about += f" of {_code(compared)}"
        elif compared:
            about += f", each compared with that of {_code(compared)} (LPIPS)"
            values = {f"lpips_{name}": value for name, value in values.items()}
        more = {"images": measures["images"], "report": file, **settings}
        if "weights" in measures:
            about += f"; features of {network}, checksum {_code(measures['weights'][:12])}"
            more["feature_weights"] = measures["weights"]
        about += _name_machine(machine)
        found.append(Figures(file, values, compared, about, more, sampling))
    return found


def _read_tokenizer(file: str, table: dict[str, Any]) -> list[Figures]:
    values = {
        "psnr_db": table["psnr_db"], **({"ssim": table["ssim"]} if "ssim" in table else {}),
        "codes_used": table["usage"], "codebook_perplexity": table["perplexity"],
    }  # fmt: skip
    data = shorten(table.get("data"))
    about = f"reconstructions of {table['images']:,} images" + (f" of {_code(data)}" if data else "")
    about += f"; {table['codebook']} codes, all scales together"
    return [Figures(file, values, data, about, {"images": table["images"], "report": file})]


def _read_classifier(file: str, table: dict[str, Any]) -> list[Figures]:
    data = shorten(table["data"])
    values = {"accuracy": table["accuracy"], "cross_entropy": table["loss"]}
    about = f"{table['images']:,} images of {_code(data)}"
    return [Figures(file, values, data, about, {"images": table["images"], "report": file})]


def _read_encoder(file: str, table: dict[str, Any]) -> list[Figures]:
    test, bank = shorten(table["test"]), shorten(table["data"])
    about = f"the class of {table['test_images']:,} images of {_code(test)}, by a vote of the {table['neighbours']} "
    about += f"nearest of {table['data_images']:,} images of {_code(bank)} (temperature {table['temperature']}, cosine)"
    names = ("neighbours", "temperature", "data_images")
    settings = {"images": table["test_images"], "report": file, **{name: table[name] for name in names}}
    return [Figures(file, {"knn_accuracy": table["knn_accuracy"]}, test, about, settings)]


def _read_quickstart(file: str, table: dict[str, Any]) -> list[Figures]:
    """metrics.json of a quickstart."""
    names = ("generated_read_as_asked", "reconstruction_psnr_db")  # the first where there are classes
    values = {name: table[name] for name in names if name in table}
    values["held_out_nats"] = table["cross_entropy_nats_per_token"]["held_out"]
    about = f"{table['generated_images']:,} samples and the images that the quickstart held out"
    return [Figures(file, values, "", about, {"images": table["generated_images"], "report": file})]


def _name_machine(machine: dict[str, Any]) -> str:
    parts = [str(machine[name]) for name in ("device", "date") if machine.get(name)]
    return f"; {', '.join(parts)}" if parts else ""


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else f"{value}"


def _code(text: str) -> str:
    """A name as code in Markdown."""
    return f"`{text.replace('`', chr(39))}`"
