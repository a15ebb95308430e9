"""Labelled image sets. Small sets are held in memory as uint8; images of larger sets are decoded when they are needed.

The held-out images are the data set's own validation or test split where it has one; otherwise they are a share of
every class, drawn with the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.common.sizes import Size, expand_size, format_size
from nextscale.config.classes import list_names
from nextscale.config.data import DataConfig, ReadConfig
from nextscale.data.captions import TextBatches, fetch_text
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Batch
from nextscale.data.images import crop_randomly, load_image, read_size, resize_and_crop
from nextscale.data.inputs import describe_data
from nextscale.data.sources import Parquet, Source, open_source
from nextscale.data.sources.captions import Captions

Keep = Callable[[Tensor], Tensor]
"""From the widths and heights of images, int64 (B, 2), to which are used, bool (B,)."""
_MAX_ENLARGED = 0.5
_MEMORY_LIMIT = 2**31
"""Bytes of uint8 images up to which a set is held in memory."""
_CHECKED_GROUPS = 20
"""Row groups of a table up to which classes are checked for readable images."""
_REPLACEMENT_TRIES = 20
"""How many images after an unreadable one are tried in its place."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with labels."""

    images_B3HW: Tensor
    """uint8."""
    labels_B: Tensor
    """int64, 0 to len(class_names) - 1."""
    class_names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    """Names of files that were skipped because they cannot be read."""
    enlarged: tuple[str, ...] = ()
    """Names of files that were smaller than the size and were enlarged."""
    is_held_out_B: Tensor | None = None
    """The data set's own split; None where it has none."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the images are made of, see `nextscale.common.inputs`."""
    notes: tuple[str, ...] = ()
    """What of the data set is not used, and how it was understood, a line each."""
    captions: Captions | None = None
    """None where they were not asked for."""
    shapes_B2: Tensor | None = None
    """Width and height of the images before they were resized, int64; None where nothing was read."""

    def __len__(self) -> int:
        return len(self.images_B3HW)

    def print_notes(self) -> None:
        """Print the classes with their counts, what is not used, and which files are unreadable or too small."""
        print_data_set(self.class_names, [self.labels_B], self.list_notes())

    def list_notes(self) -> list[str]:
        """What is not used, and which files are unreadable or too small, a line each."""
        notes = (("left out {} unreadable images", self.unreadable), ("enlarged {} images too small", self.enlarged))
        lines = [f"{text.format(len(names))}: {'; '.join(names[:5])}" for text, names in notes if names]
        return [*self.notes, *lines]

    def select(self, index: Tensor) -> ImageSet:
        """The set with these images only."""
        is_held_out_B = None if self.is_held_out_B is None else self.is_held_out_B[index]
        images_B3HW, labels_B = self.images_B3HW[index], self.labels_B[index]
        captions = None if self.captions is None else self.captions.select(index.numpy())
        shapes_B2 = None if self.shapes_B2 is None else self.shapes_B2[index]
        return replace(
            self, images_B3HW=images_B3HW, labels_B=labels_B, is_held_out_B=is_held_out_B, captions=captions,
            shapes_B2=shapes_B2,
        )  # fmt: skip

    def keep(self, keep: Keep | None) -> ImageSet:
        """The set with the images of the shapes that `keep` takes."""
        if keep is None:
            return self
        assert self.shapes_B2 is not None, "read_images gives the shapes"
        return self.select(keep(self.shapes_B2).nonzero().flatten())

    def crop_centre(self, side: int) -> ImageSet:
        """The set with the central squares of this side of its images."""
        top, left = ((length - side) // 2 for length in self.images_B3HW.shape[-2:])
        return replace(self, images_B3HW=self.images_B3HW[..., top : top + side, left : left + side])

    def split(self, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(training, held-out) images, see `split_rows`."""
        train_rows, held_out_rows = split_rows(self.labels_B, self.is_held_out_B, held_out, seed)
        return self.select(train_rows), self.select(held_out_rows)

    def to_examples(self, flip: bool = False, seed: int = 0) -> ImageExamples:
        """The images as examples for a trainer."""
        return ImageExamples(
            self.labels_B, flip, seed, memory_B3HW=self.images_B3HW, inputs=self.inputs, captions=self.captions
        )


def split_rows(labels_B: Tensor, is_held_out_B: Tensor | None, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) rows: the data set's own split, else this share of every class, at least one row of two."""
    order = torch.randperm(len(labels_B), generator=make_generator(seed, "split"))
    if is_held_out_B is None:
        is_held_out_B = torch.zeros(len(labels_B), dtype=torch.bool)
        for label in labels_B.unique():
            members = order[labels_B[order] == label]
            is_held_out_B[members[: max(round(held_out * len(members)), int(len(members) > 1))]] = True
    return order[~is_held_out_B[order]], order[is_held_out_B[order]]


def load_images(
    data: str, size: Size, limit: int = 10**9, seed: int = 0, config: ReadConfig | None = None, captioned: bool = False
) -> ImageSet:
    """Read the images of `data` (see `open_source`) into memory, resized and centre-cropped to `size`.

    At most `limit` images, drawn with `seed`. The result names unreadable files, which are skipped, and enlarged ones.
    `captioned`: with captions; labels may be missing.
    Raises UserError when more than a tenth of the files are unreadable, when more than half are smaller than `size`,
    when no image is left, when all images of a class are unreadable and `config` does not allow that, or when `data`
    cannot be opened.
    """
    config = config or ReadConfig()
    return read_images(
        open_source(data, size, config, captioned=captioned), size, limit, seed,
        allow_empty_classes=config.allow_empty_classes,
    )  # fmt: skip


def read_images(
    source: Source, size: Size, limit: int, seed: int, max_unreadable: float = 0.1, allow_empty_classes: bool = False
) -> ImageSet:
    """Like `load_images`, from a source. `max_unreadable`: the largest accepted share of unreadable images."""
    height, width = expand_size(size)
    rows, is_held_out_B = choose_rows(source, limit, seed)
    images, shapes, readable, unreadable, enlarged = [], [], [], [], []
    for i, row in enumerate(tqdm(rows.tolist(), desc="reading images", unit="image", disable=len(rows) < 500)):
        try:
            pixels, original = decode_image(source, row, (height, width))
        except UserError as error:
            unreadable.append(str(error))
            continue
        images.append(torch.from_numpy(pixels))
        shapes.append(original)
        readable.append(i)
        if original[0] < width or original[1] < height:
            name, _ = source.read(row)
            enlarged.append(f"{name} ({original[0]} x {original[1]})")
    if not images or len(unreadable) > max_unreadable * len(rows):
        first = "; ".join(unreadable[:3])
        raise UserError(f"{len(unreadable)} of {len(rows)} images in {source.where} cannot be read: {first}")
    if len(enlarged) > _MAX_ENLARGED * len(images):
        raise UserError(
            f"{len(enlarged)} of {len(images)} images in {source.where} are smaller than the model's {width} x "
            f"{height}, such as {enlarged[0]}: a model trained on enlarged images would draw blurred ones; choose a "
            "smaller size, or larger images"
        )
    all_labels_B = torch.tensor(source.labels)[rows]
    lost = sorted(set(all_labels_B.tolist()) - set(all_labels_B[readable].tolist()))
    if lost and not allow_empty_classes:
        _refuse_unreadable(source, lost, unreadable)
    stacked = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    is_held_out_B = None if is_held_out_B is None else is_held_out_B[readable]
    captions = None if source.captions is None else source.captions.select(rows[readable].numpy())
    return ImageSet(
        stacked, all_labels_B[readable], source.class_names, tuple(unreadable), tuple(enlarged), is_held_out_B,
        describe_data(source), tuple(source.unused.format_lines()), captions, torch.tensor(shapes),
    )  # fmt: skip


def _refuse_unreadable(source: Source, classes: Sequence[int], unreadable: Sequence[str]) -> None:
    names = list_names(source.class_names[number] for number in classes)
    raise UserError(
        f"no image of {names} in {source.where} can be read, such as {unreadable[0]}; repair or remove the class, or "
        "give --images.allow-empty-classes"
    )


def check_readable(source: Source, rows: Tensor) -> None:
    """Raise UserError when no image among these rows can be read of a class that has some.

    Decodes one image of each class, and more where that fails. Tables on the hub or of many row groups, which would
    have to be read as a whole, are not checked.
    """
    if isinstance(source, Parquet) and (source.on_hub or len(source.groups) > _CHECKED_GROUPS):
        return
    seen: dict[int, bool] = {}
    unreadable = []
    for row in rows.tolist():
        label = source.labels[row]
        if not seen.get(label):
            try:
                decode_image(source, row, None)
                seen[label] = True
            except UserError as error:
                seen[label] = False
                unreadable.append(str(error))
    lost = [label for label, readable in sorted(seen.items()) if not readable]
    if lost:
        _refuse_unreadable(source, lost, unreadable)


def choose_rows(source: Source, limit: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """At most `limit` rows of a source, in order, and which of them its own split holds out (None without a split)."""
    if source.splits:
        is_held_out = torch.zeros(len(source.labels), dtype=torch.bool)
        is_held_out[source.splits["held_out"]] = True
        rows = torch.tensor(sorted(source.splits["train"] + source.splits["held_out"]))
    else:
        is_held_out, rows = None, torch.arange(len(source.labels))
    rows = rows[torch.randperm(len(rows), generator=make_generator(seed, "limit"))[:limit].sort().values]
    return rows, None if is_held_out is None else is_held_out[rows]


def decode_image(
    source: Source, row: int, size: tuple[int, int] | None, crop: Callable[[Image.Image], Image.Image] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels (H, W, 3) of a row, uint8, and the image's original width and height.

    `size`: (height, width); None: do not resize. `crop`: used in place of the centre crop. UserError names a row that
    cannot be read.
    """
    name, picture = source.read(row)
    if picture is None:
        raise UserError(f"{name} (it holds no image)")
    try:
        image = load_image(picture)
    except UserError as error:
        raise UserError(f"{name} ({error})" if isinstance(picture, bytes) else str(error)) from error
    cropped = crop(image) if crop else resize_and_crop(image, size) if size else image
    return np.array(cropped), image.size


def read_shapes(source: Source, rows: Tensor) -> Tensor:
    """Width and height of the images of these rows, int64 (B, 2), from their headers; (1, 1) of unreadable ones."""
    shapes = []
    for row in tqdm(rows.tolist(), desc="reading shapes", unit="image", disable=len(rows) < 5000):
        _, picture = source.read(row)
        shapes.append(read_size(picture) if picture is not None else (1, 1))
    return torch.tensor(shapes, dtype=torch.int64).view(-1, 2)


@dataclass
class ImageExamples:
    """Images as examples for a trainer: from memory, or decoded when they are fetched."""

    labels_B: Tensor
    flip: bool = False
    seed: int = 0
    memory_B3HW: Tensor | None = None
    source: Source | None = None
    rows_B: Tensor | None = None
    """Rows of the source."""
    size: Size = 0
    """Of the images that are decoded."""
    random_crop: bool = False
    skipped: Sequence[str] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the images are made of, see `nextscale.common.inputs`."""
    notes: Sequence[str] = ()
    """What of the data set is not used, and what is odd about it, a line each."""
    captions: Captions | None = None
    """Those of all images; None where they were not asked for."""
    texts: TextBatches | None = None
    """What of the captions is in a batch; None = nothing."""

    def __len__(self) -> int:
        return len(self.labels_B)

    @property
    def decodes(self) -> bool:
        return self.memory_B3HW is None

    def order(self, rng: torch.Generator) -> Tensor:
        if self.source is None or self.rows_B is None:
            return torch.randperm(len(self), generator=rng)
        position = torch.empty(int(self.rows_B.max()) + 1, dtype=torch.int64)
        position[self.rows_B] = torch.arange(len(self))
        return position[self.source.order(self.rows_B, rng)]

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """uint8 images (B, 3, H, W), labels, and what `texts` gives. An unreadable image is replaced by the next one,
        and named."""
        unreadable: list[str] = []
        index_B = torch.as_tensor(indices)
        if self.memory_B3HW is not None:
            image_B3HW = self.memory_B3HW[index_B]
        else:
            pairs = zip(indices, positions or repeat(None), strict=False)
            decoded = [self._read(index, position, unreadable) for index, position in pairs]
            index_B = torch.tensor([index for index, _ in decoded])
            image_BHW3 = torch.stack([torch.from_numpy(pixels) for _, pixels in decoded])
            image_B3HW = image_BHW3.permute(0, 3, 1, 2).contiguous()
        if self.flip and positions is not None:
            draws = [torch.rand((), generator=make_generator(self.seed, "flip", p)) for p in positions]
            image_B3HW = torch.where((torch.stack(draws) < 0.5)[:, None, None, None], image_B3HW.flip(-1), image_B3HW)
        text = fetch_text(self.texts, index_B, positions)
        return {"image": image_B3HW, "label": self.labels_B[index_B], **text, "unreadable": unreadable}

    def _read(self, index: int, position: int | None, unreadable: list[str]) -> tuple[int, np.ndarray]:
        """The index and the pixels of this image, or of the next readable one."""
        assert self.source is not None, "images are in memory or in a source"
        assert self.rows_B is not None, "a source comes with its rows"
        crop = None
        if self.random_crop and position is not None:
            draws = torch.rand(2, generator=make_generator(self.seed, "crop", position)).tolist()
            crop = partial(crop_randomly, size=self.size, draws=draws)
        for attempt in range(_REPLACEMENT_TRIES):
            i = (index + attempt) % len(self)
            try:
                return i, decode_image(self.source, int(self.rows_B[i]), expand_size(self.size), crop)[0]
            except UserError as error:
                unreadable.append(str(error))
        raise UserError(f"{_REPLACEMENT_TRIES} images in a row cannot be read: {'; '.join(unreadable[-3:])}")


def open_dataset(
    data: str, size: Size, config: DataConfig, seed: int, *, captioned: bool = False, keep: Keep | None = None
) -> tuple[ImageExamples, ImageExamples, Source]:
    """(training, held-out) examples of `data` in this size, and the source with its class names.

    `captioned`: the examples have captions, and need no labels. `keep`: which images are used, by their shapes; the
    parts are drawn before, so that an image is held out in every size or in none.

    A set that fits into memory is read at once; images of
    others are decoded when they are fetched. Raises UserError in the same cases as `load_images`.
    """
    source = open_source(data, size, config, captioned=captioned)
    if config.caption_column and not captioned:
        source.unused.remark("captions are not used here, so --images.caption-column has no effect")
    image_bytes = 3 * math.prod(expand_size(size))
    if not config.random_crop and image_bytes * min(len(source.labels), config.limit) <= _MEMORY_LIMIT:
        images = read_images(
            source, size, config.limit, seed, config.max_unreadable, allow_empty_classes=config.allow_empty_classes
        )
        train_images, held_out_images = (part.keep(keep) for part in images.split(config.held_out, seed))
        train, held_out = train_images.to_examples(config.flip, seed), held_out_images.to_examples()
        train.skipped = images.unreadable
        notes = images.list_notes()
    else:
        rows, is_held_out_B = choose_rows(source, config.limit, seed)
        labels_B = torch.tensor(source.labels)[rows]
        a, b = split_rows(labels_B, is_held_out_B, config.held_out, seed)
        if keep is not None:
            a, b = (part[keep(read_shapes(source, rows[part]))] for part in (a, b))
        train = ImageExamples(labels_B[a], config.flip, seed, None, source, rows[a], size, config.random_crop)
        held_out = ImageExamples(labels_B[b], source=source, rows_B=rows[b], size=size)
        if source.captions is not None:
            train.captions, held_out.captions = (source.captions.select(part.numpy()) for part in (rows[a], rows[b]))
        train.inputs = held_out.inputs = describe_data(source)
        if not config.allow_empty_classes:
            check_readable(source, rows)
        notes = source.unused.format_lines()
    if keep is not None and not (len(train) and len(held_out)):
        raise UserError(
            f"{data}: the shape of {format_size(size)} pixels is nearest to {len(train)} training and {len(held_out)} "
            "held-out images, and each part needs one: leave this size out"
        )
    if not len(train) or not len(held_out):
        raise UserError(f"{data} has too few images for held_out={config.held_out}: one part would be empty")
    train.notes = notes
    return train, held_out, source
