"""`nextscale evaluate` and `nextscale statistics`, end to end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import describe_machine
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_image, to_pil
from nextscale.config.sampling import SampleConfig
from nextscale.encoders.load import load_feature_network
from nextscale.encoders.network import FeatureNetwork
from nextscale.evaluation.collect import Look, claim_folder, collect, gathered
from nextscale.evaluation.images import Images, NpzImages, open_images
from nextscale.evaluation.measures import measure, read_as_asked, summary
from nextscale.evaluation.metrics.lpips import Lpips
from nextscale.evaluation.reference import Arrays, Reference, evenly, read_arrays
from nextscale.tokenizer.tokenizer import to_unit

_INCEPTION_WIDTH = 2048


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    count: int = 0
    """Images; 0 = all that there are, 50,000 of a model."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """Of a model."""
    size: int = 0
    """Resize and crop pictures to this; 0 = as they are, references as the images that are measured."""
    split: int = 5000
    """Images of a split of the Inception Score."""
    neighbours: int = 3
    """Of precision and recall."""
    references: int = 10_000
    """Images of the reference, evenly spaced, for precision and recall."""
    shard: int = 1000
    batch: int = 50
    dtype: str | None = None
    reconstruct: str = ""
    """Pictures that the model's tokenizer reconstructs, in place of samples."""


def evaluate(
    source: str,
    out: Path,
    networks: Sequence[str],
    references: Sequence[str],
    settings: Settings,
    world: World,
    *,
    against: str = "",
    lpips: tuple[Path, Path] | None = None,
    images_out: Path | None = None,
) -> dict[str, Any]:
    """Measure `source` (see `open_images`, or an .npz of features) into the JSON file `out`; return the report.

    Features are kept in a folder beside `out`; called again, it goes on from there. With several processes each makes
    its share and the first one reports. Raises UserError for anything that cannot be measured.
    """
    began = time.monotonic()
    work = out.with_suffix(".work")
    eyes = _networks(networks, world)
    given = _features_of(source)
    if given is not None:
        if against or images_out:
            raise UserError(f"{source} holds features and no images: nothing to compare in pairs or to write")
        seen = _Seen({given.network: given.features()}, {given.network: given.text("fingerprint")})
    else:
        images = _open(source, settings, world, settings.reconstruct)
        if not (eyes or lpips or against or images_out):
            raise UserError("nothing to measure: give --features (a feature network) or --against with --lpips")
        partner = _open(against, settings, world) if against else None
        if partner is not None and len(partner) != len(images):
            raise UserError(f"{source} has {len(images)} images, {against} {len(partner)}: give --num to pair as many")
        seen = _see(images, eyes, _look(eyes, settings, world, partner, lpips, images_out), work / "samples", world)
    beside = replace(settings, size=settings.size or seen.side)
    found = _references(references, eyes, beside, world, work, seen.prints)
    if not world.main:
        return {}
    measures: dict[str, Any] = {n: _figures(n, seen, source, found.get(n), settings) for n in seen.features}
    if seen.pairing is not None:
        measures["lpips"] = summary(seen.pairing) | {"against": against, "images": len(seen.pairing)}
    report = {
        "source": source,
        "machine": describe_machine(world.device),
        "protocol": seen.protocol,
        "settings": {"split": settings.split, "neighbours": settings.neighbours},
        "measures": measures,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(out, report)
    return report


@dataclass(frozen=True)
class _Seen:
    """What is known of the images that are measured. On all processes but the first, only what they share."""

    features: dict[str, dict[str, Tensor]]
    """By network."""
    prints: dict[str, str]
    """Checksums of the networks."""
    side: int = 0
    """Width of the images; 0 = unknown."""
    protocol: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    pairing: Tensor | None = None


def _see(images: Images, eyes: dict[str, FeatureNetwork], look: Look, folder: Path, world: World) -> _Seen:
    joined = _collected(images, look, folder, world)
    return _Seen(
        {n: _of_network(joined, n) for n in eyes},
        {n: network.fingerprint() for n, network in eyes.items()},
        images.width,
        images.identity(),
        images.labels(),
        joined.get("pairing"),
    )


def _figures(name: str, seen: _Seen, source: str, reference: Reference | None, settings: Settings) -> dict[str, Any]:
    """Everything that one network's features say."""
    tensors = seen.features[name]
    figures = measure(name, tensors, source, reference, settings.split, settings.neighbours)
    if name == "classifier" and seen.labels is not None and "logits" in tensors:
        figures["classifier_read_as_asked"] = read_as_asked(tensors["logits"], seen.labels)
    figures |= {"weights": seen.prints[name], "images": len(tensors["pool"])}
    if reference is not None:
        figures["reference"] = {"from": reference.where, "images": reference.images or "unknown"}
    return figures


def _of_network(joined: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One network's features among those of all."""
    return {k.partition(".")[2]: t for k, t in joined.items() if k.startswith(f"{name}.")}


def make_statistics(
    data: str, network: str, out: Path, settings: Settings, world: World, *, keep: int = 10_000
) -> Reference | None:
    """Statistics of a data set under one feature network, as an .npz that `evaluate` takes as reference.

    Returns None on all processes but the first.
    """
    (eye,) = _networks([network], world).values()
    images = open_images(data, settings.count, settings.size, settings.sampling, settings.batch)
    joined = _collected(images, _look({eye.name: eye}, settings, world), out.with_suffix(".work"), world)
    if not world.main:
        return None
    reference = Reference.of(data, _of_network(joined, eye.name), eye.name, eye.fingerprint())
    reference.save(out, keep)
    return reference


def _networks(sources: Sequence[str], world: World) -> dict[str, FeatureNetwork]:
    """Feature networks by name; UserError when two have the same."""
    found: dict[str, FeatureNetwork] = {}
    for source in sources:
        network = load_feature_network(source)
        if network.name in found:
            raise UserError(f"two feature networks are named {network.name}: measure them in two reports")
        found[network.name] = network.to(world.device) if isinstance(network, torch.nn.Module) else network
    return found


def _features_of(source: str) -> Arrays | None:
    """The file's features, when `source` is an .npz of features."""
    if not source.endswith(".npz"):
        return None
    arrays = read_arrays(Path(source))
    if arrays.has_features:
        return arrays
    if not arrays.has_samples:
        raise UserError(f"{source} holds statistics alone: it can be a --reference, not what is measured")
    return None


def _open(source: str, settings: Settings, world: World, reconstruct: str = "") -> Images:
    return open_images(
        source, settings.count, settings.size, settings.sampling, settings.batch, reconstruct,
        dtype=settings.dtype, device=world.device,
    )  # fmt: skip


def _look(
    eyes: dict[str, FeatureNetwork],
    settings: Settings,
    world: World,
    partner: Images | None = None,
    lpips: tuple[Path, Path] | None = None,
    images_out: Path | None = None,
) -> Look:
    if (partner is None) != (lpips is None):
        raise UserError("LPIPS compares images in pairs: give both --against and --lpips NETWORK HEADS")
    pairing = None
    if lpips is not None:
        judge = Lpips.from_files(*lpips).to(world.device)

        def pairing(a: Tensor, b: Tensor) -> Tensor:
            return judge(to_unit(a), to_unit(b))

    def keep(first: int, pixels: Tensor) -> None:
        assert images_out is not None, "only called when images are kept"
        for i, picture in enumerate(to_pil(pixels), start=first):
            save_image(picture, images_out / f"{i:06d}.png")

    return Look(
        list(eyes.values()), partner, pairing, settings.shard, settings.batch, world.device,
        keep if images_out else None,
    )  # fmt: skip


def _collected(images: Images, look: Look, folder: Path, world: World) -> dict[str, Tensor]:
    """All features of the images; what other processes made is waited for. Empty but on the first process."""
    if world.main:
        claim_folder(images, look, folder)
    world.wait()
    collect(images, look, folder, world.rank, world.size)
    world.wait()
    return gathered(folder, len(images), look.shard) if world.main else {}


def _references(
    sources: Sequence[str],
    eyes: dict[str, FeatureNetwork],
    settings: Settings,
    world: World,
    work: Path,
    prints: dict[str, str],
) -> dict[str, Reference]:
    """The reference of each network. UserError when one is of another network, or needs one that is not given."""
    found: dict[str, Reference] = {}
    for number, source in enumerate(sources):
        folder = work / f"reference-{number}"
        arrays = read_arrays(Path(source)) if source.endswith(".npz") else None
        if arrays is not None and (arrays.has_statistics or arrays.has_features):
            reference = _of_file(arrays, eyes, settings, world, folder)
            name = reference.network
            if reference.fingerprint and prints.get(name) and reference.fingerprint != prints[name]:
                raise UserError(f"{source} was made with other weights of the {name} network: make it anew")
            if name not in prints:
                raise UserError(f"{source} is of the {name} network; the features measured are {', '.join(prints)}'s")
            found[name] = reference
        elif not eyes:
            raise UserError(f"{source} holds images, whose features are not known: give --features, or statistics")
        else:
            images = open_images(source, 0, 0 if arrays else settings.size, settings.sampling, settings.batch)
            joined = _collected(images, _look(eyes, settings, world), folder, world)
            for name in eyes if world.main else ():
                tensors = _of_network(joined, name)
                whole = Reference.of(source, tensors, name, prints[name])
                some = evenly(len(tensors["pool"]), settings.references)
                found[name] = replace(whole, pool_MD=tensors["pool"][some])
    return found


def _of_file(
    arrays: Arrays, eyes: dict[str, FeatureNetwork], settings: Settings, world: World, folder: Path
) -> Reference:
    """Statistics, with features for precision and recall or (ADM) images to make them of; or features alone."""
    if not arrays.has_statistics:
        return Reference.of(str(arrays.path), arrays.features(), arrays.network, arrays.text("fingerprint"))
    reference = arrays.reference()
    width = len(reference.moments["pool"].mean_D)
    if not reference.network and width != _INCEPTION_WIDTH:
        raise UserError(f"{arrays.path} does not say of which network it is, and {width} channels are not Inception's")
    name = reference.network or "inception"
    if reference.pool_MD is None and arrays.has_samples and name in eyes:
        images = NpzImages(arrays.path)
        joined = _collected(images, _look({name: eyes[name]}, settings, world), folder, world)
        if world.main:
            reference = replace(reference, pool_MD=joined[f"{name}.pool"])
    return replace(reference, network=name)


def as_text(report: dict[str, Any], out: Path) -> str:
    """The figures for people."""
    lines = []
    for network, figures in report["measures"].items():
        lines.append(f"{network}, {figures['images']} images:")
        lines += [f"  {name:<28}{value:>12.4f}" for name, value in figures.items() if isinstance(value, float)]
        lines += [f"  note: {note}" for note in figures.get("notes", ())]
    return "\n".join([*lines, f"wrote {out}"])
