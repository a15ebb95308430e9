"""Labelled image sets: held in memory as uint8 where they are small, decoded as they are asked for where they are not.

What is held out to measure with is part of a set's definition: the split that the data came with, else a share of every
class, chosen from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.data import DataConfig
from nextscale.data.examples import Batch
from nextscale.data.images import fit, load_image, random_crop
from nextscale.data.sources import Source, open_source

_MAX_ENLARGED = 0.5
_IN_MEMORY = 2**31
_NEXT_TRIES = 20


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with labels."""

    images_B3HW: Tensor
    """uint8."""
    labels_B: Tensor
    """int64, 0 to len(class_names) - 1."""
    class_names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    """Names of files that were left out because they could not be read."""
    enlarged: tuple[str, ...] = ()
    """Names of files that were smaller than the size."""
    is_held_out_B: Tensor | None = None
    """The split that the data came with."""

    def __len__(self) -> int:
        return len(self.images_B3HW)

    def say_remarks(self) -> None:
        """Print what a user should know of how the set was read: one line for each kind of trouble."""
        kinds = (("left out {} unreadable images", self.unreadable), ("enlarged {} images too small", self.enlarged))
        for text, names in kinds:
            if names:
                print(f"note: {text.format(len(names))}: {'; '.join(names[:5])}")

    def subset(self, index: Tensor) -> ImageSet:
        mine = None if self.is_held_out_B is None else self.is_held_out_B[index]
        return replace(self, images_B3HW=self.images_B3HW[index], labels_B=self.labels_B[index], is_held_out_B=mine)

    def split(self, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(training, held-out) parts, see `split_rows`."""
        train, held = split_rows(self.labels_B, self.is_held_out_B, held_out, seed)
        return self.subset(train), self.subset(held)

    def examples(self, flip: bool = False, seed: int = 0) -> ImageExamples:
        """As a trainer takes them."""
        return ImageExamples(self.labels_B, flip, seed, memory_B3HW=self.images_B3HW)


def split_rows(labels_B: Tensor, is_held_out_B: Tensor | None, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) rows: as the data came, else this share of every class and at least one where it has two."""
    order = torch.randperm(len(labels_B), generator=make_generator(seed, "split"))
    is_held = torch.zeros(len(labels_B), dtype=torch.bool) if is_held_out_B is None else is_held_out_B
    if is_held_out_B is None:
        for label in labels_B.unique():
            members = order[labels_B[order] == label]
            is_held[members[: max(round(held_out * len(members)), int(len(members) > 1))]] = True
    return order[~is_held[order]], order[is_held[order]]


def load_images(data: str, size: int, limit: int = 10**9, seed: int = 0) -> ImageSet:
    """All images of `data` (see `open_source`) as size x size, in memory.

    At most `limit` images, chosen from `seed`. Unreadable files are left out and named in the result, and so are those
    that had to be enlarged; UserError when more than a tenth are unreadable, more than half smaller than `size`, when
    nothing is left, or when `data` is no source.
    """
    return read_all(open_source(data, size), size, limit, seed)


def read_all(source: Source, size: int, limit: int, seed: int, max_unreadable: float = 0.1) -> ImageSet:
    """As `load_images`, of a source; UserError above another share of unreadable images."""
    rows, is_held_out_B = choose_rows(source, limit, seed)
    images, kept, unreadable, enlarged = [], [], [], []
    for place, row in enumerate(_progress(rows.tolist())):
        try:
            pixels, original = decode(source, row, size)
        except UserError as error:
            unreadable.append(str(error))
            continue
        images.append(torch.from_numpy(pixels))
        kept.append(place)
        if min(original) < size:
            name, _ = source.read(row)
            enlarged.append(f"{name} ({original[0]} x {original[1]})")
    if not images or len(unreadable) > max_unreadable * len(rows):
        some = "; ".join(unreadable[:3])
        raise UserError(f"{len(unreadable)} of {len(rows)} images in {source.where} cannot be read: {some}")
    if len(enlarged) > _MAX_ENLARGED * len(images):
        raise UserError(
            f"{len(enlarged)} of {len(images)} images in {source.where} are smaller than the model's {size} x {size}, "
            f"such as {enlarged[0]}: a model of them would learn to blur; choose a smaller size, or larger images"
        )
    stacked = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    labels_B = torch.tensor(source.labels)[rows[kept]]
    held = None if is_held_out_B is None else is_held_out_B[kept]
    return ImageSet(stacked, labels_B, source.class_names, tuple(unreadable), tuple(enlarged), held)


def choose_rows(source: Source, limit: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """At most `limit` rows of a source, in order, and which of them the data came with as held out."""
    if source.parts:
        held = torch.zeros(len(source.labels), dtype=torch.bool)
        held[source.parts["held_out"]] = True
        rows = torch.tensor(sorted(source.parts["train"] + source.parts["held_out"]))
    else:
        held, rows = None, torch.arange(len(source.labels))
    rows = rows[torch.randperm(len(rows), generator=make_generator(seed, "limit"))[:limit].sort().values]
    return rows, None if held is None else held[rows]


def decode(
    source: Source, row: int, size: int, crop: Callable[[Image.Image], Image.Image] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels (size, size, 3) of a row, and its width and height before; UserError names a row that cannot be read.

    `size` 0: as it is. `crop`: how it is cut, in place of the centre.
    """
    name, picture = source.read(row)
    if picture is None:
        raise UserError(f"{name} (it holds no image)")
    try:
        image = load_image(picture)
    except UserError as error:
        raise UserError(f"{name} ({error})" if isinstance(picture, bytes) else str(error)) from error
    cut = crop(image) if crop else fit(image, (size, size)) if size else image
    return np.array(cut), image.size


def _progress(rows: list[int]) -> Iterator[int]:
    yield from tqdm(rows, desc="reading images", unit="image", disable=len(rows) < 500)


@dataclass
class ImageExamples:
    """Images as a trainer takes them: from memory, or decoded when they are asked for."""

    labels_B: Tensor
    flip: bool = False
    seed: int = 0
    memory_B3HW: Tensor | None = None
    source: Source | None = None
    rows_B: Tensor | None = None
    """Rows of the source."""
    size: int = 0
    random_crop: bool = False
    left_out: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels_B)

    def order(self, rng: torch.Generator) -> Tensor:
        if self.source is None or self.rows_B is None:
            return torch.randperm(len(self), generator=rng)
        position = torch.empty(int(self.rows_B.max()) + 1, dtype=torch.int64)
        position[self.rows_B] = torch.arange(len(self))
        return position[self.source.order(self.rows_B, rng)]

    def fetch(self, index: Sequence[int], place: Sequence[int] | None) -> Batch:
        """uint8 images (B, 3, H, W) and labels. An unreadable image is replaced by the next one, and named."""
        unreadable: list[str] = []
        chosen = torch.as_tensor(index)
        if self.memory_B3HW is not None:
            image_B3HW = self.memory_B3HW[chosen]
        else:
            found = [self._read(i, p, unreadable) for i, p in zip(index, place or repeat(None), strict=False)]
            chosen = torch.tensor([i for i, _ in found])
            image_B3HW = torch.stack([torch.from_numpy(pixels) for _, pixels in found]).permute(0, 3, 1, 2).contiguous()
        if self.flip and place is not None:
            draws = [torch.rand((), generator=make_generator(self.seed, "flip", p)) for p in place]
            image_B3HW = torch.where((torch.stack(draws) < 0.5)[:, None, None, None], image_B3HW.flip(-1), image_B3HW)
        return {"image": image_B3HW, "label": self.labels_B[chosen], "unreadable": unreadable}

    def _read(self, index: int, place: int | None, unreadable: list[str]) -> tuple[int, np.ndarray]:
        assert self.source is not None, "images are in memory or in a source"
        assert self.rows_B is not None, "a source comes with its rows"
        crop = None
        if self.random_crop and place is not None:
            draws = torch.rand(2, generator=make_generator(self.seed, "crop", place)).tolist()
            crop = partial(random_crop, size=self.size, draws=draws)
        for attempt in range(_NEXT_TRIES):
            here = (index + attempt) % len(self)
            try:
                return here, decode(self.source, int(self.rows_B[here]), self.size, crop)[0]
            except UserError as error:
                unreadable.append(str(error))
        raise UserError(f"{_NEXT_TRIES} images in a row cannot be read: {'; '.join(unreadable[-3:])}")


def open_images(data: str, size: int, config: DataConfig, seed: int) -> tuple[ImageExamples, ImageExamples, Source]:
    """(training, held-out) examples of `data` at `size` x `size`, and the source with its class names.

    Sets that fit into memory are read at once, others as they are needed. Raises UserError as `load_images`.
    """
    source = open_source(data, size)
    if not config.random_crop and 3 * size * size * min(len(source.labels), config.limit) <= _IN_MEMORY:
        images = read_all(source, size, config.limit, seed, config.max_unreadable)
        images.say_remarks()
        train, held_out = images.split(config.held_out, seed)
        parts = train.examples(config.flip, seed), held_out.examples()
        parts[0].left_out = images.unreadable
    else:
        rows, is_held_out_B = choose_rows(source, config.limit, seed)
        labels_B = torch.tensor(source.labels)[rows]
        both = split_rows(labels_B, is_held_out_B, config.held_out, seed)
        parts = (
            ImageExamples(labels_B[both[0]], config.flip, seed, None, source, rows[both[0]], size, config.random_crop),
            ImageExamples(labels_B[both[1]], source=source, rows_B=rows[both[1]], size=size),
        )
    if not len(parts[0]) or not len(parts[1]):
        raise UserError(f"{data} has too few images for held_out={config.held_out}: one part would be empty")
    return *parts, source
