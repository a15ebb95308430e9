"""Features of many images, shard by shard: shared among processes, kept on disk, resumed where they broke off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints.native import read_safetensors
from nextscale.common.files import record_settings, write_atomically
from nextscale.encoders.network import FeatureNetwork
from nextscale.evaluation.images import Images

Pairing = Callable[[Tensor, Tensor], Tensor]
"""A distance (B,) between uint8 images (B, 3, H, W) in pairs."""


@dataclass(frozen=True)
class Look:
    """What is done with the images."""

    networks: Sequence[FeatureNetwork]
    partner: Images | None = None
    """Images that are compared with these in pairs, by `pairing`."""
    pairing: Pairing | None = None
    shard: int = 1000
    batch: int = 50
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    keep: Callable[[int, Tensor], None] | None = None
    """Called with the number of a batch's first image and the images, to keep them."""


def claim_folder(images: Images, look: Look, folder: Path) -> None:
    """Note in `folder` whose features it holds; UserError when it holds those of other images or networks."""
    settings: dict[str, Any] = {
        "images": images.identity(),
        "networks": {network.name: network.fingerprint() for network in look.networks},
        "partner": look.partner.identity() if look.partner else None,
        "shard": look.shard,
        "images written": look.keep is not None,
    }
    record_settings(folder / "features.json", settings)
    for draft in folder.glob(".*.part*"):  # a run killed while it wrote leaves one
        draft.unlink(missing_ok=True)


def collect(images: Images, look: Look, folder: Path, rank: int = 0, size: int = 1) -> None:
    """Make the shards of `folder` that are missing and whose number is `rank` modulo `size`."""
    starts = range(0, len(images), look.shard)
    missing = [
        (number, start)
        for number, start in enumerate(starts)
        if number % size == rank and not shard_path(folder, number).exists()
    ]
    total = sum(min(start + look.shard, len(images)) - start for _, start in missing)
    with tqdm(total=total, desc=f"features of {images.where}", unit="image", disable=rank > 0 or not total) as bar:
        for number, start in missing:
            tensors = _look_at(images, range(start, min(start + look.shard, len(images))), look, bar)
            with write_atomically(shard_path(folder, number)) as (draft,):
                save_file(tensors, draft)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"features-{number:05d}.safetensors"


@torch.no_grad()
def _look_at(images: Images, rows: range, look: Look, bar: tqdm) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for start in range(rows.start, rows.stop, look.batch):
        stop = min(start + look.batch, rows.stop)
        pixels = images.fetch(start, stop)
        if look.keep is not None:
            look.keep(start, pixels)
        on_device = pixels.to(look.device)
        for network in look.networks:
            for kind, tensor in network(on_device).to_dict().items():
                pieces.setdefault(f"{network.name}.{kind}", []).append(tensor.cpu())
        if look.partner is not None and look.pairing is not None:
            other = look.partner.fetch(start, stop).to(look.device)
            pieces.setdefault("pairing", []).append(look.pairing(on_device, other).cpu())
        bar.update(stop - start)
    return {name: torch.cat(tensors).contiguous() for name, tensors in pieces.items()}


def gathered(folder: Path, count: int, shard: int) -> dict[str, Tensor]:
    """All shards of a folder joined: {"inception.pool": (N, D), ...}."""
    parts = [read_safetensors(shard_path(folder, number)) for number in range(-(-count // shard))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
