"""The images that are measured: samples of a model, a folder or table of images, or an .npz of samples.

All are returned as uint8, so that the same samples have the same metrics whatever their source.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.pictures import to_uint8
from nextscale.common.sizes import Size, expand_size
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.data.classes import Classes, match_classes
from nextscale.data.datasets import decode_image
from nextscale.data.sources import open_source
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.tokenizer import scale_to_unit


class MeasuredImages(Protocol):
    """Images by number."""

    where: str
    size: tuple[int, int]
    """(height, width) of each image in pixels."""

    def __len__(self) -> int: ...

    def fetch(self, start: int, stop: int) -> Tensor:
        """uint8 (B, 3, H, W)."""

    def labels(self) -> Tensor | None:
        """The class of each image, int64; None where it is unknown."""

    def classes(self) -> Classes | None:
        """The classes that the labels count; None where labels are unknown."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images, as JSON values."""


class ModelImages:
    """Samples of a model: image i has class i modulo the number of classes, and its own random stream of the seed.

    `match_order` takes the classes in another order instead.
    """

    def __init__(self, pipeline: Pipeline, where: str, count: int, settings: SampleConfig, batch: int):
        if settings.official_seeding:
            raise UserError("official_seeding makes an image depend on its batch; it cannot be measured in shards")
        self.pipeline, self.where, self.count, self.settings, self.batch = pipeline, where, count, settings, batch
        self.order = tuple(range(pipeline.transformer.config.condition.num_classes))
        self.size = pipeline.config.image_size

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        labels = [self.order[i % len(self.order)] for i in range(start, stop)]
        images = self.pipeline.sample(labels, self.settings, batch_size=self.batch, first_image=start)
        return to_uint8(images.tensor)

    def labels(self) -> Tensor:
        return torch.tensor(self.order)[torch.arange(self.count) % len(self.order)]

    def classes(self) -> Classes:
        return Classes.of_model(self.where, self.pipeline.config)

    def match_order(self, other: ModelImages) -> str:
        """Give each image the class that it has in `other`, by name; UserError when the classes differ. The note."""
        match = match_classes(other.classes(), self.classes())
        self.order = match.index
        return match.note

    def identity(self) -> dict[str, Any]:
        networks = torch.nn.ModuleList([self.pipeline.tokenizer, self.pipeline.transformer])
        return {
            "model": self.where,
            "weights": compute_fingerprint(networks.state_dict()),
            "compute_dtype": str(next(self.pipeline.transformer.parameters()).dtype).removeprefix("torch."),
            "sampling": to_dict(self.settings),
            "images": self.count,
            "samples_per_class": self.count / len(self.order),
            **({} if self.order == tuple(range(len(self.order))) else {"order of classes": list(self.order)}),
        }


class StoredImages:
    """Images of a folder or a table, in the order of their names, unchanged or resized and centre-cropped."""

    def __init__(self, data: str, size: Size = 0, count: int = 0):
        """`size`: resize and crop to it; 0 = leave images unchanged, and refuse those that are not of one size."""
        self.where = data
        self.source = open_source(data, size or 8)
        self.count = _check_count(data, len(self.source.labels), count)
        self.resized = bool(size)
        width, height = decode_image(self.source, 0, None)[1] if not size else expand_size(size)[::-1]
        self.size = height, width

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        pixels = []
        for i in range(start, stop):
            image_HW3, (width, height) = decode_image(self.source, i, self.size if self.resized else None)
            if not self.resized and (height, width) != self.size:
                raise UserError(
                    f"{self.source.read(i)[0]} is {width} x {height}, the first image of {self.where} "
                    f"{self.size[1]} x {self.size[0]}; give --size to resize and crop them all"
                )
            pixels.append(torch.from_numpy(image_HW3))
        return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        return torch.tensor(self.source.labels[: self.count]) if self.classes() else None

    def classes(self) -> Classes | None:
        names = self.source.class_names
        return Classes.of_data(self.where, names) if len(names) > 1 else None

    def identity(self) -> dict[str, Any]:
        return {
            "pictures": self.where,
            "images": self.count,
            "size": list(self.size),
            "resized": self.resized,
        }


class Reconstructions:
    """Images encoded and decoded by a model's tokenizer. Their metrics bound those of its generators."""

    def __init__(self, pipeline: Pipeline, where: str, originals: MeasuredImages):
        self.pipeline, self.where, self.originals, self.size = pipeline, where, originals, originals.size

    def __len__(self) -> int:
        return len(self.originals)

    @torch.no_grad()
    def fetch(self, start: int, stop: int) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        image_B3HW = scale_to_unit(self.originals.fetch(start, stop)).to(self.pipeline.device)
        return to_uint8((tokenizer.decode(tokenizer.encode(image_B3HW)) + 1) / 2)

    def labels(self) -> Tensor | None:
        return self.originals.labels()

    def classes(self) -> Classes | None:
        return self.originals.classes()

    def identity(self) -> dict[str, Any]:
        weights = compute_fingerprint(self.pipeline.tokenizer.state_dict())
        return {"reconstructed by": self.where, "weights": weights, "pictures": self.originals.identity()}


class NpzImages:
    """Samples in the format of ADM's scripts: arr_0, uint8 (N, H, W, 3); class labels, where known, in arr_1."""

    def __init__(self, path: Path, count: int = 0):
        self.where, self.path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shape, fortran_order, self.dtype = read(member)
                self.offset = member.tell()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no .npz with samples in arr_0: {error}") from error
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or fortran_order:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3); got {self.dtype} {self.shape}")
        self.count, self.size = _check_count(self.where, self.shape[0], count), (self.shape[1], self.shape[2])

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        image_bytes = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.seek(self.offset + start * image_bytes)
            data = member.read((stop - start) * image_bytes)
        if len(data) != (stop - start) * image_bytes:
            raise UserError(f"{self.path} is truncated: images {start} to {stop} are incomplete")
        images = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        with np.load(self.path) as arrays:
            return torch.from_numpy(arrays["arr_1"][: self.count].astype(np.int64)) if "arr_1" in arrays else None

    def classes(self) -> Classes | None:
        labels = self.labels()
        return None if labels is None else Classes.of_data(self.where, list(map(str, range(int(labels.max()) + 1))))

    def identity(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"npz": self.where, "images": self.count, "bytes": stat.st_size}


def _check_count(where: str, available: int, requested: int) -> int:
    """The number of images to measure, `requested` or (0) all that are available."""
    if requested > available or not available:
        raise UserError(f"{where} holds {available} images, {requested or 1} are asked for")
    return requested or available


def open_images(
    source: str, count: int, size: Size, settings: SampleConfig, batch: int, reconstruct: str = "", **load: Any
) -> MeasuredImages:
    """The images of a checkpoint folder, an .npz of samples, or a data set (folder, table, name on the hub).

    `count`: number of images, 0 for all (50,000 of a model). `size`: resize and crop a data set's images, 0 for
    unchanged. `reconstruct`: images that the model's tokenizer reconstructs, in place of samples. `load`: dtype and
    device of a model.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return NpzImages(path, count)
    if reconstruct:
        pipeline = Pipeline.from_pretrained(source, **load)
        return Reconstructions(pipeline, source, StoredImages(reconstruct, pipeline.config.image_size, count))
    if (path / "config.json").is_file():
        return ModelImages(Pipeline.from_pretrained(source, **load), source, count or 50_000, settings, batch)
    return StoredImages(source, size, count)
