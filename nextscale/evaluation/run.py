"""`nextscale evaluate` and `nextscale statistics`: features of images and reference, metrics, report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints.verify import list_digests
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.machine import describe_machine
from nextscale.common.sizes import Size, format_size
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.lora import parse_source
from nextscale.data.classes import Classes
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.load import load_feature_network
from nextscale.encoders.network import FeatureNetwork
from nextscale.evaluation.compute import compute_class_accuracy, compute_metrics, summarize_values
from nextscale.evaluation.extract import (
    CONTENT,
    Extraction,
    extract_features,
    read_features,
    record_extraction,
    sort_rows,
)
from nextscale.evaluation.images import (
    MeasuredImages,
    ModelImages,
    NpzImages,
    check_columns,
    compare_pairs,
    open_images,
    pair_rows,
)
from nextscale.evaluation.metrics.lpips import Lpips
from nextscale.evaluation.reference import NpzFile, Reference, choose_evenly, read_npz
from nextscale.tokenizer.tokenizer import scale_to_unit

_INCEPTION_WIDTH = 2048


@dataclass(frozen=True)
class _ImageFeatures:
    """Features of the measured images. On all processes but the first, the features are absent."""

    features: dict[str, dict[str, Tensor]]
    """By network and kind (pool, spatial, logits)."""
    fingerprints: dict[str, str]
    """Of the networks."""
    size: Size = 0
    """(height, width) of the images; 0 = unknown."""
    protocol: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    classes: Classes | None = None
    """Of the labels."""
    pair_distances: Tensor | None = None


def evaluate(
    source: str,
    out: Path,
    networks: Sequence[str],
    references: Sequence[str],
    config: EvaluationConfig,
    world: World,
    *,
    against: str = "",
    lpips: tuple[Path, Path] | None = None,
    images_out: Path | None = None,
) -> dict[str, Any]:
    """Measure `source` (see `open_images`, or an .npz of features), write the JSON file `out` and return the report.

    Features are stored in a folder next to `out`; a second call continues there. With several processes each extracts
    its share and the first one reports. Raises UserError for anything that cannot be measured.
    """
    began = time.monotonic()
    work = out.with_suffix(".work")
    loaded = _load_networks(networks, world)
    npz = _read_feature_file(source)
    if npz is not None:
        if against or images_out:
            raise UserError(f"{source} holds features and no images: nothing to compare in pairs or to write")
        opened = _open_references(references, loaded, config)
        check_columns(opened)
        measured = _ImageFeatures({npz.network: sort_rows(npz.features())}, {npz.network: npz.read_text("fingerprint")})
    else:
        given_by = next((name for name in references if not name.endswith(".npz")), "")
        images = _open_images(source, config, world, config.reconstruct, given_by)
        if not (loaded or lpips or against or images_out):
            raise UserError("nothing to measure: give --features (a feature network) or --against with --lpips")
        partner = _open_partner(against, images, config, world, given_by) if against else None
        opened = _open_references(references, loaded, replace(config, size=config.size or images.size))
        check_columns([images, *([partner] if partner else ()), *opened])
        extraction = _plan_extraction(loaded, config, world, partner, lpips, images_out)
        measured = _measure_images(images, loaded, extraction, work / "samples", world)
    by_network = _measure_references(opened, loaded, config, world, work, measured.fingerprints)
    if not world.main:
        return {}
    measures: dict[str, Any] = {
        name: _report_network(name, measured, source, by_network.get(name), config) for name in measured.features
    }
    notes = [note for name in measures if (note := _add_class_accuracy(measures[name], loaded.get(name), measured))]
    if measured.pair_distances is not None:
        distances = measured.pair_distances
        measures["lpips"] = summarize_values(distances) | {"against": against, "images": len(distances)}
    report = {
        "source": source,
        **_name_weights(source, config.lora),
        "machine": describe_machine(world.device),
        "protocol": measured.protocol,
        "settings": {"split": config.split, "neighbours": config.neighbours},
        "measures": measures,
        **({"notes": notes} if notes else {}),
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(out, add_digest(report))
    return report


def _name_weights(source: str, lora: Sequence[str]) -> dict[str, Any]:
    """The digests of the model in the folder `source`, so that its card takes figures of its own weights alone; with
    adapters, these."""
    if lora:
        return {"adapters": {entry: list_digests(Path(parse_source(entry)[0])) for entry in lora}}
    is_model = (Path(source) / "config.json").is_file()
    return {"model_weights": list_digests(Path(source))} if is_model else {}


def make_statistics(
    data: str, network: str, out: Path, config: EvaluationConfig, world: World, *, feature_images: int = 10_000
) -> Reference | None:
    """Statistics of a data set under one feature network, as an .npz that `evaluate` takes as reference.

    `feature_images`: number of images whose features are stored, for precision and recall. Returns None on all
    processes but the first.
    """
    (loaded,) = _load_networks([network], world).values()
    images = open_images(data, config.count, config.size, config.sampling, config.batch, reading=config.images)
    check_columns([images])
    extraction = _plan_extraction({loaded.name: loaded}, config, world)
    tensors = _extract(images, extraction, out.with_suffix(".work"), world)
    if not world.main:
        return None
    reference = Reference.compute(data, _select_network(tensors, loaded.name), loaded.name, loaded.fingerprint())
    size, made_of = format_size(images.size), json.dumps(images.identity())
    reference = replace(reference, size=size, made_of=made_of)
    reference.save(out, feature_images)
    return reference


def format_report(report: dict[str, Any], out: Path) -> str:
    """The metrics of a report as lines of text."""
    lines = []
    for network, metrics in report["measures"].items():
        lines.append(f"{network}, {metrics['images']} images:")
        lines += [f"  {name:<28}{value:>12.4f}" for name, value in metrics.items() if isinstance(value, float)]
        lines += [f"  note: {note}" for note in metrics.get("notes", ())]
    lines += [f"note: {note}" for note in report.get("notes", ())]
    return "\n".join([*lines, f"wrote {out}"])


# ---- the measured images


def _load_networks(sources: Sequence[str], world: World) -> dict[str, FeatureNetwork]:
    """Feature networks by name; UserError when two have the same name."""
    networks: dict[str, FeatureNetwork] = {}
    for source in sources:
        network = load_feature_network(source)
        if network.name in networks:
            raise UserError(f"two feature networks are named {network.name}: measure them in two reports")
        networks[network.name] = network.to(world.device) if isinstance(network, torch.nn.Module) else network
    return networks


def _read_feature_file(source: str) -> NpzFile | None:
    """The file, when `source` is an .npz of features; None for images."""
    if not source.endswith(".npz"):
        return None
    npz = read_npz(Path(source))
    if npz.has_features:
        return npz
    if not npz.has_samples:
        raise UserError(f"{source} holds statistics alone: it can be a --reference, but cannot be measured")
    return None


def _open_images(
    source: str, config: EvaluationConfig, world: World, reconstruct: str = "", given_by: str = ""
) -> MeasuredImages:
    images = open_images(
        source, config.count, config.size, config.sampling, config.batch, reconstruct, reading=config.images,
        given_by=given_by, scales=config.scales, dtype=config.dtype, device=world.device, capture=config.capture,
        lora=config.lora,
    )  # fmt: skip
    if (config.lora or config.scales) and not isinstance(images, ModelImages):
        option = "--lora adds adapters to" if config.lora else "--scales is for"
        raise UserError(f"{option} a model that samples; {source} is none")
    if isinstance(images, ModelImages):
        images.pipeline.tokenizer.decode_batch = config.decode_batch
    return images


def _open_partner(
    against: str, images: MeasuredImages, config: EvaluationConfig, world: World, given_by: str
) -> MeasuredImages:
    """The images to compare with `images` one by one: a model's have the same classes, by name."""
    config = replace(config, size=config.size or images.size, lora=(), scales="")
    partner = _open_images(against, config, world, given_by=given_by)
    notes = []
    if isinstance(partner, ModelImages) and isinstance(images, ModelImages):
        notes.append(partner.match_order(images))
    if len(partner) != len(images):
        raise UserError(
            f"{images.where} has {len(images)} images, {against} {len(partner)}: give --num to pair as many"
        )
    pair_rows(images, partner)
    notes.append(compare_pairs(images, partner))
    for note in notes:
        _print_note(note, world)
    return partner


def _print_note(note: str, world: World) -> None:
    if note and world.main:
        print(f"note: {note}")


def _plan_extraction(
    networks: dict[str, FeatureNetwork],
    config: EvaluationConfig,
    world: World,
    partner: MeasuredImages | None = None,
    lpips: tuple[Path, Path] | None = None,
    images_out: Path | None = None,
) -> Extraction:
    if (partner is None) != (lpips is None):
        raise UserError("LPIPS compares images in pairs: give both --against and --lpips NETWORK HEADS")
    pair_distance, fingerprint = None, ""
    if lpips is not None:
        distance = Lpips.from_files(*lpips).to(world.device)
        fingerprint = compute_fingerprint(distance.state_dict())

        def pair_distance(a: Tensor, b: Tensor) -> Tensor:
            return distance(scale_to_unit(a), scale_to_unit(b))

    return Extraction(
        list(networks.values()), partner, pair_distance, config.shard, config.batch, world.device, fingerprint,
        images_out,
    )  # fmt: skip


def _extract(images: MeasuredImages, extraction: Extraction, folder: Path, world: World) -> dict[str, Tensor]:
    """All features of the images, extracted by all processes, in the order of the images' contents, and under "order"
    the numbers of the images. Empty on all processes but the first."""
    if world.main:
        _print_note(getattr(images, "size_note", ""), world)
        record_extraction(images, extraction, folder)
    world.wait()
    extract_features(images, extraction, folder, world.rank, world.size)
    world.wait()
    if not world.main:
        return {}
    tensors = read_features(folder, len(images), extraction)
    order = tensors.pop(CONTENT).argsort(stable=True)
    return {name: tensor[order] for name, tensor in tensors.items()} | {"order": order}


def _select_network(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The features of one network, by kind."""
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _measure_images(
    images: MeasuredImages, networks: dict[str, FeatureNetwork], extraction: Extraction, folder: Path, world: World
) -> _ImageFeatures:
    tensors, labels_N = _extract(images, extraction, folder, world), images.labels()
    return _ImageFeatures(
        {name: _select_network(tensors, name) for name in networks},
        {name: network.fingerprint() for name, network in networks.items()},
        images.size,
        images.identity(),
        labels_N if labels_N is None or not world.main else labels_N[tensors["order"]],
        images.classes(),
        tensors.get("pairing"),
    )


def _report_network(
    name: str, measured: _ImageFeatures, source: str, reference: Reference | None, config: EvaluationConfig
) -> dict[str, Any]:
    """All metrics of one network's features."""
    tensors = measured.features[name]
    metrics = compute_metrics(name, tensors, source, reference, config.split, config.neighbours)
    metrics |= {"weights": measured.fingerprints[name], "images": len(tensors["pool"])}
    if reference is not None:
        if reference.size and measured.size and reference.size != format_size(measured.size):
            text = f"the images are of {format_size(measured.size)}, those of {reference.where} of {reference.size}"
            metrics["notes"] = [*metrics.get("notes", ()), f"{text} pixels: the distance depends on both sizes"]
        metrics["reference"] = {"from": reference.where, "images": reference.images or "unknown"}
    return metrics


def _add_class_accuracy(metrics: dict[str, Any], network: FeatureNetwork | None, measured: _ImageFeatures) -> str:
    """Add `classifier_read_as_asked` to a classifier's metrics where classes are known; return a note, or nothing."""
    if not isinstance(network, Classifier) or measured.labels is None or measured.classes is None:
        return ""
    known = Classes.of_data("the classifier", network.class_names)
    logits_NC = measured.features[network.name]["logits"]
    accuracy, note = compute_class_accuracy(logits_NC, measured.labels, measured.classes, known)
    if accuracy is not None:
        metrics["classifier_read_as_asked"] = accuracy
    return note


# ---- the reference


def _open_references(
    sources: Sequence[str], networks: dict[str, FeatureNetwork], config: EvaluationConfig
) -> list[NpzFile | MeasuredImages]:
    """Files of statistics or features, and images, which are resized to `config.size`."""
    opened: list[NpzFile | MeasuredImages] = []
    for source in sources:
        npz = read_npz(Path(source)) if source.endswith(".npz") else None
        if npz is not None and (npz.has_statistics or npz.has_features):
            opened.append(npz)
            continue
        if not networks:
            raise UserError(f"{source} holds images without features: give --features, or statistics")
        size = 0 if npz else config.size
        opened.append(open_images(source, 0, size, config.sampling, config.batch, reading=config.images))
    return opened


def _measure_references(
    opened: Sequence[NpzFile | MeasuredImages],
    networks: dict[str, FeatureNetwork],
    config: EvaluationConfig,
    world: World,
    work: Path,
    fingerprints: dict[str, str],
) -> dict[str, Reference]:
    """The reference of each network. UserError when one is of a network that is not measured, or of other weights."""
    references: dict[str, Reference] = {}
    for number, images in enumerate(opened):
        folder = work / f"reference-{number}"
        if isinstance(images, NpzFile):
            reference = _read_reference(images, networks, config, world, folder)
            name = reference.network
            if reference.fingerprint and fingerprints.get(name) and reference.fingerprint != fingerprints[name]:
                raise UserError(
                    f"{images.path} was made with other weights of the {name} network: make the statistics again"
                )
            if name not in fingerprints:
                measured = ", ".join(fingerprints)
                raise UserError(f"{images.path} is of the {name} network; the features measured are {measured}'s")
            references[name] = reference
        else:
            tensors = _extract(images, _plan_extraction(networks, config, world), folder, world)
            for name in networks if world.main else ():
                features = _select_network(tensors, name)
                reference = Reference.compute(images.where, features, name, fingerprints[name])
                index = choose_evenly(len(features["pool"]), config.references)
                references[name] = replace(reference, pool_MD=features["pool"][index])
    return references


def _read_reference(
    npz: NpzFile, networks: dict[str, FeatureNetwork], config: EvaluationConfig, world: World, folder: Path
) -> Reference:
    """The reference of a file of features or of statistics.

    Precision and recall need features: the file's own or, in a file of ADM's, those of its sample images.
    """
    if not npz.has_statistics:
        return Reference.compute(str(npz.path), npz.features(), npz.network, npz.read_text("fingerprint"))
    reference = npz.to_reference()
    width = len(reference.moments["pool"].mean_D)
    if not reference.network and width != _INCEPTION_WIDTH:
        raise UserError(f"{npz.path} does not name its network, and {width} channels are not Inception's")
    name = reference.network or "inception"
    if reference.pool_MD is None and npz.has_samples and name in networks:
        images = NpzImages(npz.path)
        tensors = _extract(images, _plan_extraction({name: networks[name]}, config, world), folder, world)
        if world.main:
            reference = replace(reference, pool_MD=tensors[f"{name}.pool"])
    return replace(reference, network=name)
