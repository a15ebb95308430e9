"""The images that are measured: samples of a model, a folder or table of images, or an .npz of samples.

All are returned as uint8, so that the same samples have the same metrics whatever their source.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.checkpoints.official_files import ZIP_ERRORS, check_zip
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint, fingerprint_bytes, fingerprint_path
from nextscale.common.inputs import RANDOM_NUMBER_GENERATOR, RANDOM_NUMBERS
from nextscale.common.notes import print_note
from nextscale.common.pictures import to_uint8
from nextscale.common.precision import get_name
from nextscale.common.sizes import Size, expand_size
from nextscale.config.condition import OTHERS
from nextscale.config.data import ReadConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig, count_scales
from nextscale.data.classes import Classes, match_classes
from nextscale.data.datasets import decode_image
from nextscale.data.describe import print_data_set
from nextscale.data.given import ImageConditions
from nextscale.data.inputs import describe_data
from nextscale.data.parts import choose_part
from nextscale.data.sources import open_optional
from nextscale.evaluation.sizes import choose_size
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
        self.order = self.list_classes()
        last = count_scales(settings, len(pipeline.config.pyramid)) - 1
        height, width = (side * pipeline.config.tokenizer.downsampling for side in pipeline.config.pyramid.sides[last])
        self.size = height, width

    def __len__(self) -> int:
        return self.count

    def fetch(self, start: int, stop: int) -> Tensor:
        labels = [self.order[i % len(self.order)] for i in range(start, stop)]
        images = self.pipeline.sample(labels, self.settings, batch_size=self.batch, first_image=start)
        return to_uint8(images.tensor)

    def list_classes(self) -> tuple[int, ...]:
        """The classes in the order in which images are drawn. UserError where the model has none."""
        return tuple(
            range(self.pipeline.transformer.config.condition.require_classes("measuring a model draws images"))
        )

    def labels(self) -> Tensor | None:
        return self._choose_in_turn()

    def _choose_in_turn(self) -> Tensor:
        """The number in `order` that each image has, int64."""
        return torch.tensor(self.order)[torch.arange(self.count) % len(self.order)]

    def classes(self) -> Classes | None:
        return Classes.of_model(self.where, self.pipeline.config)

    def match_order(self, other: ModelImages) -> str:
        """Give each image the class that it has in `other`, by name; UserError when the classes differ. The note."""
        theirs, ours = other.classes(), self.classes()
        if theirs is None or ours is None:
            return ""
        match = match_classes(theirs, ours)
        self.order = match.index
        return match.note

    def identity(self) -> dict[str, Any]:
        networks = torch.nn.ModuleList([self.pipeline.tokenizer, self.pipeline.transformer])
        return {
            "model": self.where,
            "weights": compute_fingerprint(networks.state_dict()),
            "compute_dtype": get_name(self.pipeline.dtype),
            "sampling": to_dict(self.settings),
            RANDOM_NUMBERS: RANDOM_NUMBER_GENERATOR,
            "images": self.count,
            "samples_per_class": self.count / len(self.order),
            **_name_scales(self.pipeline),
            **({} if self.order == tuple(range(len(self.order))) else {"order of classes": list(self.order)}),
        }


def _name_scales(pipeline: Pipeline) -> dict[str, str]:
    """The scales of a model that runs at others than its own."""
    pyramid = pipeline.config.pyramid
    return {} if pyramid == pipeline.tokenizer.quantizer.tables else {"scales": str(pyramid)}


class ConditionedImages(ModelImages):
    """Samples of a model that draws from more than a class: image i has what image i of a data set gives, in turn, and
    its own random stream of the seed. `order` may hold the numbers of the data set's images in another order."""

    def __init__(
        self, pipeline: Pipeline, where: str, count: int, settings: SampleConfig, batch: int, given: ImageConditions
    ):
        self.given = given
        super().__init__(pipeline, where, count, settings, batch)

    def fetch(self, start: int, stop: int) -> Tensor:
        given = self.given.read([self.order[i % len(self.order)] for i in range(start, stop)])
        images = self.pipeline.sample(config=self.settings, batch_size=self.batch, first_image=start, **given)
        return to_uint8(images.tensor)

    def list_classes(self) -> tuple[int, ...]:
        return tuple(range(len(self.given)))

    def labels(self) -> Tensor | None:
        return None if self.given.labels_N is None else self.given.labels_N[self._choose_in_turn()]

    def classes(self) -> Classes | None:
        return None if self.given.labels_N is None else super().classes()

    def match_order(self, other: ModelImages) -> str:
        return ""

    def identity(self) -> dict[str, Any]:
        known = super().identity()
        order = known.pop("order of classes", None)
        del known["samples_per_class"]
        digest = {} if order is None else {"order": fingerprint_bytes(repr(order).encode())}
        return known | {"given by": self.given.identity(), **digest}


class StoredImages:
    """Images of a folder or a table, or a part of them, resized and centre-cropped where they are not of one size."""

    def __init__(self, data: str, size: Size = 0, count: int = 0, reading: ReadConfig | None = None):
        """`size`: resize and crop to it; 0 = the size of the images, see `choose_size`. `count`: the number of images,
        drawn from all classes; 0 = all. Prints the classes with their counts, and what is not used. Labels are not
        needed; `lacking`: see `open_optional`."""
        self.where = data
        self.source, self.lacking = open_optional(data, size or 8, reading)
        print_data_set(self.source.class_names, [torch.tensor(self.source.labels)], self.source.unused.format_lines())
        self.available = len(self.source.labels)
        self.size, self.size_note = (expand_size(size), "") if size else choose_size(self.source)
        self.resized = bool(size)
        self.rows = choose_part(self.available, _check_count(data, self.available, count), self.all_labels())

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> Tensor | None:
        """The class of every image that is stored."""
        return torch.tensor(self.source.labels) if self.classes() else None

    def fetch(self, start: int, stop: int) -> Tensor:
        pixels = []
        for row in self.rows[start:stop].tolist():
            image_HW3, (width, height) = decode_image(self.source, row, self.size)
            if not self.resized and not self.size_note and (height, width) != self.size:
                name, _ = self.source.read(row)
                text = f"{name} is {width} x {height}; it is resized and cropped to {self.size[1]} x {self.size[0]}"
                print_note("images of another size", text)
            pixels.append(torch.from_numpy(image_HW3))
        return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        labels_N = self.all_labels()
        return None if labels_N is None else labels_N[self.rows]

    def classes(self) -> Classes | None:
        names = self.source.class_names
        return Classes.of_data(self.where, names) if len(names) > 1 else None

    def identity(self) -> dict[str, Any]:
        return {
            "pictures": describe_data(self.source),
            **_describe_part(self.rows, self.available),
            "size": list(self.size),
            "resized": self.resized,
            "sizes": self.size_note or "one",
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
        by = {"reconstructed by": self.where, "weights": weights, **_name_scales(self.pipeline)}
        return {**by, "pictures": self.originals.identity()}


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
        except ZIP_ERRORS as error:
            raise UserError(f"{path} is no .npz with samples in arr_0: {error}") from error
        check_zip(path)  # parts are read later without regard to the checksum of the whole
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or fortran_order:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3); got {self.dtype} {self.shape}")
        self.available, self.size = self.shape[0], (self.shape[1], self.shape[2])
        count = _check_count(self.where, self.available, count)
        self.rows = choose_part(self.available, count, self.all_labels() if count < self.available else None)

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> Tensor | None:
        """The class of every image that is stored."""
        with np.load(self.path) as arrays:
            if "arr_1" not in arrays:
                return None
            labels_N = torch.from_numpy(arrays["arr_1"].astype(np.int64))
        if labels_N.shape != (self.available,) or int(labels_N.min()) < 0:
            raise UserError(f"{self.path}: arr_1 must hold a class, 0 or more, for each of {self.available} images")
        return labels_N

    def fetch(self, start: int, stop: int) -> Tensor:
        image_bytes, data = int(np.prod(self.shape[1:])), b""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            for row in self.rows[start:stop].tolist():
                member.seek(self.offset + row * image_bytes)
                data += member.read(image_bytes)
        if len(data) != (stop - start) * image_bytes:
            raise UserError(f"{self.path} is truncated: images {start} to {stop} are incomplete")
        images = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Tensor | None:
        labels_N = self.all_labels()
        return None if labels_N is None else labels_N[self.rows]

    def classes(self) -> Classes | None:
        labels = self.all_labels()
        return None if labels is None else Classes.of_data(self.where, list(map(str, range(int(labels.max()) + 1))))

    def identity(self) -> dict[str, Any]:
        return {"npz": fingerprint_path(self.path), **_describe_part(self.rows, self.available)}


def _describe_part(rows: Tensor, available: int) -> dict[str, Any]:
    """Which of the stored images are measured."""
    chosen = "all" if len(rows) == available else fingerprint_bytes(rows.numpy().tobytes())
    return {"images": len(rows), "of": available, "rows": chosen}


def pair_rows(images: MeasuredImages, partner: MeasuredImages) -> None:
    """Let both sides have the same numbers in a comparison image by image; UserError when their sizes differ.

    Image i of a model is compared with the i-th image that is stored. Of two stored sets, of which only a part is
    compared, the part is drawn from all classes of the first.
    """
    if images.size != partner.size:
        (a, b), (c, d) = images.size, partner.size
        raise UserError(f"{images.where} has images of {b} x {a}, {partner.where} of {d} x {c}: give --size")
    stored = [_find_stored(side) for side in (images, partner)]
    first, second = stored
    count, rows = len(images), torch.arange(len(images))
    if first is not None and second is not None:
        common, labels_N = min(first.available, second.available), first.all_labels()
        rows = choose_part(common, count, None if labels_N is None else labels_N[:common])
    for side in stored:
        if side is not None:
            side.rows = rows


def _find_stored(images: object) -> StoredImages | NpzImages | None:
    """What holds the stored images of a side; None where a model samples them."""
    images = images.originals if isinstance(images, Reconstructions) else images
    return images if isinstance(images, StoredImages | NpzImages) else None


def _check_count(where: str, available: int, requested: int) -> int:
    """The number of images to measure, `requested` or (0) all that are available."""
    if requested > available or not available:
        raise UserError(f"{where} holds {available} images, {requested or 1} are asked for")
    return requested or available


def check_columns(images: Sequence[object]) -> None:
    """Raise UserError when a column was asked for that none of the data sets has. A model and .npz files have none."""
    stored = [found for side in images if isinstance(found := _find_stored(side), StoredImages)]
    for option, error in stored[0].lacking.items() if stored else ():
        if all(option in side.lacking for side in stored):
            raise error


def compare_pairs(images: MeasuredImages, partner: MeasuredImages) -> str:
    """A note on pairs of images that have different classes; empty where there are none, or classes are unknown."""
    classes, others, labels, other_labels = images.classes(), partner.classes(), images.labels(), partner.labels()
    if classes is None or others is None or labels is None or other_labels is None:
        return ""
    try:
        match = match_classes(others, classes, subset=True)
    except UserError as error:
        return f"pairs compare images of different classes: {error}"
    differ = int((match.map_labels(other_labels) != labels).sum())
    return f"{differ} of {len(labels)} pairs compare images of different classes" if differ else ""


def open_images(
    source: str, count: int, size: Size, settings: SampleConfig, batch: int, reconstruct: str = "",
    reading: ReadConfig | None = None, given_by: str = "", scales: str = "", **load: Any,
) -> MeasuredImages:  # fmt: skip
    """The images of a checkpoint folder, an .npz of samples, or a data set (folder, table, name on the hub).

    `count`: number of images, 0 for all (50,000 of a model). `size`: resize and crop a data set's images, 0 for
    unchanged. `reading`: how a data set is read. `reconstruct`: images that the model's tokenizer reconstructs, in
    place of samples. `given_by`: the data set whose captions, edges or labels a model draws from that takes more than a
    class. `scales`: of a model, in place of its own. `load`: dtype and device of a model.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return NpzImages(path, count)
    if reconstruct:
        pipeline = Pipeline.from_pretrained(source, **load).at(scales)
        return Reconstructions(pipeline, source, StoredImages(reconstruct, pipeline.config.image_size, count, reading))
    if (path / "config.json").is_file():
        pipeline = Pipeline.from_pretrained(source, **load).at(scales)
        condition = pipeline.transformer.config.condition
        if condition.kind in OTHERS and not given_by:
            described = condition.describe()
            raise UserError(f"{source} draws images from {described}: give images to take them from, as --reference")
        if condition.kind in OTHERS:
            given = ImageConditions(given_by, source, pipeline.config, reading)
            return ConditionedImages(pipeline, source, count or 50_000, settings, batch, given)
        return ModelImages(pipeline, source, count or 50_000, settings, batch)
    return StoredImages(source, size, count, reading)
