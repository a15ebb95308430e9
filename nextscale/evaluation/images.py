"""Where the images that are measured come from: a model, a folder or table of pictures, or an .npz of samples.

All are handed out as uint8, so that the same samples give the same figures whichever way they come.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.pictures import to_uint8
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.data.datasets import decode_image
from nextscale.data.sources import open_source
from nextscale.encoders.network import fingerprint
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.tokenizer import to_unit


class Images(Protocol):
    """Images by number."""

    where: str
    width: int
    """Of each, in pixels."""

    def __len__(self) -> int: ...

    def fetch(self, start: int, stop: int) -> Tensor:
        """uint8 (B, 3, H, W)."""

    def labels(self) -> Tensor | None:
        """The class asked for of each image, int64, where that is known."""

    def identity(self) -> dict[str, Any]:
        """All that decides the images, as JSON values."""


class ModelImages:
    """Samples of a model: image i shows class i modulo the classes, from its own stream of the seed."""

    def __init__(self, pipeline: Pipeline, where: str, count: int, settings: SampleConfig, batch: int):
        if settings.official_seeding:
            raise UserError("official_seeding makes an image depend on its batch, so it cannot be measured in shards")
        self.pipeline, self.where, self.count, self.settings, self.batch = pipeline, where, count, settings, batch
        self.classes, self.width = pipeline.transformer.config.condition.num_classes, pipeline.config.image_size[1]

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        labels = [i % self.classes for i in range(start, stop)]
        images = self.pipeline.sample(labels, self.settings, batch_size=self.batch, first_image=start)
        return to_uint8(images.tensor)

    def labels(self) -> Tensor:
        return torch.arange(self.count) % self.classes

    def identity(self) -> dict[str, Any]:
        networks = torch.nn.ModuleList([self.pipeline.tokenizer, self.pipeline.transformer])
        return {
            "model": self.where,
            "weights": fingerprint(networks),
            "compute_dtype": str(next(self.pipeline.transformer.parameters()).dtype).removeprefix("torch."),
            "sampling": to_dict(self.settings),
            "images": self.count,
            "samples_per_class": self.count / self.classes,
        }


class PictureImages:
    """Pictures of a folder or a table, in the order of their names, as they are or resized and centre-cropped."""

    def __init__(self, data: str, size: int = 0, count: int = 0):
        self.where = data
        self.source = open_source(data, size or 8)
        self.count = _count(data, len(self.source.labels), count)
        self.size, (self.width, self.height) = size, (size, size)
        if not size:
            self.width, self.height = decode_image(self.source, 0, 0)[1]

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        pixels = []
        for i in range(start, stop):
            image_HW3, (width, height) = decode_image(self.source, i, self.size)
            if not self.size and (width, height) != (self.width, self.height):
                raise UserError(
                    f"{self.source.read(i)[0]} is {width} x {height}, the first image of {self.where} "
                    f"{self.width} x {self.height}; give --size to resize and crop them all"
                )
            pixels.append(torch.from_numpy(image_HW3))
        return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        known = len(self.source.class_names) > 1
        return torch.tensor(self.source.labels[: self.count]) if known else None

    def identity(self) -> dict[str, Any]:
        return {
            "pictures": self.where,
            "images": self.count,
            "size": [self.height, self.width],
            "resized": self.size > 0,
        }


class Reconstructions:
    """Pictures through a model's tokenizer and back: what a generator over it could reach at best."""

    def __init__(self, pipeline: Pipeline, where: str, pictures: Images):
        self.pipeline, self.where, self.pictures, self.width = pipeline, where, pictures, pictures.width

    def __len__(self) -> int:
        return len(self.pictures)

    @torch.no_grad()
    def fetch(self, start: int, stop: int) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        image_B3HW = to_unit(self.pictures.fetch(start, stop)).to(self.pipeline.device)
        return to_uint8((tokenizer.decode(tokenizer.encode(image_B3HW)) + 1) / 2)

    def labels(self) -> Tensor | None:
        return self.pictures.labels()

    def identity(self) -> dict[str, Any]:
        weights = fingerprint(self.pipeline.tokenizer)
        return {"reconstructed by": self.where, "weights": weights, "pictures": self.pictures.identity()}


class NpzImages:
    """Samples as ADM's scripts write them: arr_0, uint8 (N, H, W, 3); labels, where there are any, in arr_1."""

    def __init__(self, path: Path, count: int = 0):
        self.where, self.path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shape, self.by_column, self.dtype = read(member)
                self.offset = member.tell()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no .npz with samples in arr_0: {error}") from error
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or self.by_column:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3); got {self.dtype} {self.shape}")
        self.count, self.width = _count(self.where, self.shape[0], count), self.shape[2]

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        each = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.seek(self.offset + start * each)
            data = member.read((stop - start) * each)
        if len(data) != (stop - start) * each:
            raise UserError(f"{self.path} is cut short: images {start} to {stop} are not whole")
        images = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        with np.load(self.path) as arrays:
            return torch.from_numpy(arrays["arr_1"][: self.count].astype(np.int64)) if "arr_1" in arrays else None

    def identity(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"npz": self.where, "images": self.count, "bytes": stat.st_size}


def _count(where: str, found: int, wanted: int) -> int:
    if wanted > found or not found:
        raise UserError(f"{where} holds {found} images, {wanted or 1} are asked for")
    return wanted or found


def open_images(
    source: str, count: int, size: int, settings: SampleConfig, batch: int, reconstruct: str = "", **load: Any
) -> Images:
    """The images of a checkpoint folder, an .npz of samples, or pictures (folder, table, hub data set).

    `count`: how many, 0 for all (50,000 of a model). `size`: to resize and crop pictures to, 0 for as they are.
    `reconstruct`: pictures that the model's tokenizer reconstructs, in place of samples. `load`: dtype and device of a
    model.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return NpzImages(path, count)
    if reconstruct:
        pipeline = Pipeline.from_pretrained(source, **load)
        return Reconstructions(pipeline, source, PictureImages(reconstruct, pipeline.config.square_side, count))
    if (path / "config.json").is_file():
        return ModelImages(Pipeline.from_pretrained(source, **load), source, count or 50_000, settings, batch)
    return PictureImages(source, size, count)
