"""Extracts features of many images in shards: distributed over processes, stored on disk, resumed after a stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints.native import read_safetensors
from nextscale.checkpoints.shards import Form, read_owner, read_shard, verify_shard, write_shard
from nextscale.common.devices import copy_to
from nextscale.common.digest import check_values
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically
from nextscale.common.inputs import discard_stale
from nextscale.common.pictures import save_image, to_pil
from nextscale.encoders.network import FeatureNetwork
from nextscale.evaluation.images import MeasuredImages

PairDistance = Callable[[Tensor, Tensor], Tensor]
"""A distance (B,) between two batches of uint8 images (B, 3, H, W)."""
CONTENT = "content"
"""Tensor with a number for the pixels of each image. Sorted by it, images have the same order wherever they come from.
"""
_REMEDY = "delete it and run the command again"


@dataclass(frozen=True)
class Extraction:
    """What is computed for each image."""

    networks: Sequence[FeatureNetwork]
    partner: MeasuredImages | None = None
    """Images that are compared with these one by one, with `pair_distance`."""
    pair_distance: PairDistance | None = None
    shard: int = 1000
    batch: int = 50
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    distance: str = ""
    """Fingerprint of the network of `pair_distance`."""
    images_out: Path | None = None
    """Folder into which each image is written, too."""


def record_extraction(images: MeasuredImages, extraction: Extraction, folder: Path) -> None:
    """Write which features `folder` holds. Features of other images or networks are deleted, and a note says why."""
    inputs: dict[str, Any] = {
        "images": images.identity(),
        "networks": {
            network.name: {"where": f"network {network.name}", "weights": network.fingerprint()}
            for network in extraction.networks
        },
        "partner": extraction.partner.identity() if extraction.partner else None,
        "lpips": {"where": "LPIPS", "weights": extraction.distance},
        "shard": extraction.shard,
        "images written": str(extraction.images_out or ""),
    }
    discard_stale(folder / "features.json", inputs, "features-*.safetensors", "features")
    for draft in folder.glob(".*.part*"):  # left by a run that was killed while writing
        draft.unlink(missing_ok=True)


def extract_features(
    images: MeasuredImages, extraction: Extraction, folder: Path, rank: int = 0, size: int = 1, show: bool = True
) -> None:
    """Write the missing shards of `folder` whose number is `rank` modulo `size`; `show`: with a progress bar."""
    starts = range(0, len(images), extraction.shard)
    missing = [
        (number, start)
        for number, start in enumerate(starts)
        if number % size == rank and not _is_done(folder, number, start, len(images), extraction)
    ]
    total = sum(min(start + extraction.shard, len(images)) - start for _, start in missing)
    owner = read_owner(folder / "features.json")
    hidden = not show or rank > 0 or not total
    with tqdm(total=total, desc=f"features of {images.where}", unit="image", disable=hidden) as bar:
        for number, start in missing:
            rows = range(start, min(start + extraction.shard, len(images)))
            tensors = _extract_shard(images, rows, extraction, bar)
            path = _shard_path(folder, number)
            with write_atomically(path) as (draft,):
                write_shard(draft, path, tensors, owner)


def read_features(folder: Path, count: int, extraction: Extraction) -> dict[str, Tensor]:
    """The features of all `count` images from the shards of a folder: {"inception.pool": (N, D), ...}.

    Raises UserError naming a shard that is damaged, that belongs to other images, or whose tensors are not those of
    the extraction.
    """
    owner = read_owner(folder / "features.json")
    forms: dict[str, Form] = {}
    shards = []
    for start in range(0, count, extraction.shard):
        path, rows = _shard_path(folder, start // extraction.shard), min(extraction.shard, count - start)
        widths = {name: shape[1:] for name, (_, shape) in forms.items()} or _list_widths(path, extraction)
        forms = {name: ([_choose_dtype(name)], (rows, *width)) for name, width in widths.items()}
        tensors = read_shard(path, owner, forms, _REMEDY)
        if not verify_shard(path, remedy=_REMEDY):
            check_values(path, tensors)
        shards.append(tensors)
    return {name: torch.cat([tensors[name] for tensors in shards]) for name in forms}


def _list_widths(path: Path, extraction: Extraction) -> dict[str, tuple[int, ...]]:
    """Names and widths of the tensors of the first shard, which all have. UserError when they are not the networks'."""
    widths = {name: tuple(tensor.shape[1:]) for name, tensor in read_safetensors(path).items()}
    needed = {f"{network.name}.pool" for network in extraction.networks} | (
        {"pairing"} if extraction.partner else set()
    )
    needed.add(CONTENT)
    known = needed | {f"{network.name}.{kind}" for network in extraction.networks for kind in ("spatial", "logits")}
    if not needed <= widths.keys() <= known:
        found = ", ".join(widths) or "nothing"
        raise UserError(f"{path} holds {found} instead of {', '.join(sorted(known))}; {_REMEDY}")
    return widths


def _choose_dtype(name: str) -> torch.dtype:
    return torch.int64 if name == CONTENT else torch.float32


def _is_done(folder: Path, number: int, start: int, count: int, extraction: Extraction) -> bool:
    """Whether a shard's features, and its images where they were asked for, are written."""
    numbers = range(start, min(start + extraction.shard, count)) if extraction.images_out else ()
    written = (_name_image(extraction, i).exists() for i in numbers)
    return _shard_path(folder, number).exists() and all(written)


def _name_image(extraction: Extraction, i: int) -> Path:
    assert extraction.images_out is not None, "only called when images are written"
    return extraction.images_out / f"{i:06d}.png"


def hash_rows(values_NX: Tensor) -> Tensor:
    """A number (N,), int64, for the content of each row: equal for equal bytes, whatever the order of the rows."""
    rows = values_NX.contiguous().flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def sort_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of a file in an order that does not depend on the file's."""
    order = hash_rows(tensors["pool"]).argsort(stable=True)
    return {name: tensor[order] for name, tensor in tensors.items()}


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"


@torch.no_grad()
def _extract_shard(images: MeasuredImages, rows: range, extraction: Extraction, bar: tqdm) -> dict[str, Tensor]:
    batches: dict[str, list[Tensor]] = {}
    for start in range(rows.start, rows.stop, extraction.batch):
        stop = min(start + extraction.batch, rows.stop)
        pixels_B3HW = images.fetch(start, stop)
        if extraction.images_out is not None:
            for i, image in enumerate(to_pil(pixels_B3HW), start=start):
                save_image(image, _name_image(extraction, i))
        batches.setdefault(CONTENT, []).append(hash_rows(pixels_B3HW))
        on_device = copy_to(pixels_B3HW, extraction.device)
        for network in extraction.networks:
            for kind, tensor in network(on_device).to_dict().items():
                batches.setdefault(f"{network.name}.{kind}", []).append(tensor.cpu())
        if extraction.partner is not None and extraction.pair_distance is not None:
            partner = copy_to(extraction.partner.fetch(start, stop), extraction.device)
            batches.setdefault("pairing", []).append(extraction.pair_distance(on_device, partner).cpu())
        bar.update(stop - start)
    return {name: torch.cat(tensors).contiguous() for name, tensors in batches.items()}
