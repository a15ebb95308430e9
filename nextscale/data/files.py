"""Images that a user names: files, folders of images, and tables of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.data.datasets import decode_image
from nextscale.data.images import load_image, resize_and_crop
from nextscale.data.sources import open_source


@dataclass(frozen=True)
class NamedImages:
    """Images of one size with their names."""

    images: list[Image.Image]
    """8-bit RGB, resized and cropped."""
    names: list[str]
    """Paths, or rows of tables."""
    sizes: list[tuple[int, int]]
    """(width, height) before resizing."""

    def add(self, name: str, image: Image.Image, original: tuple[int, int]) -> None:
        """Add an image that had this (width, height)."""
        self.names.append(name)
        self.images.append(image)
        self.sizes.append(original)

    def print_notes(self, size: tuple[int, int]) -> None:
        """Print a line for each image that was smaller than the model's size (height, width)."""
        for name, (width, height) in zip(self.names, self.sizes, strict=True):
            if height < size[0] or width < size[1]:
                own = f"{size[1]} x {size[0]}"
                print(f"note: {name} is {width} x {height}, smaller than the model's {own}; it is enlarged")


def load_named_images(paths: Sequence[Path], size: tuple[int, int], reading: ReadConfig | None = None) -> NamedImages:
    """The images of files, in this order; a folder or a table gives all its images, in the order of a data set.

    Images are resized and cropped to `size` (height, width). Labels are not needed. `reading`: which columns of tables
    hold the images. Raises UserError for a file that cannot be read. Of a
    folder, unreadable images are passed over with a note, unless there is no other.
    """
    found = NamedImages([], [], [])
    for path in paths:
        if path.is_dir() or path.suffix in (".parquet", ".tar"):
            _load_source(str(path), size, reading, found)
        else:
            image = load_image(path)
            found.add(str(path), resize_and_crop(image, size), image.size)
    return found


def _load_source(data: str, size: tuple[int, int], reading: ReadConfig | None, found: NamedImages) -> None:
    """Add the readable images of a folder or a table."""
    source, unreadable = open_source(data, size, reading, labelled=False), []
    for row in range(len(source.labels)):
        try:
            pixels_HW3, original = decode_image(source, row, size)
        except UserError as error:
            unreadable.append(str(error))
            continue
        found.add(source.read(row)[0], Image.fromarray(pixels_HW3), original)
    if len(unreadable) == len(source.labels):
        raise UserError(f"no image of {data} can be read: {'; '.join(unreadable[:3])}")
    if unreadable:
        print(f"note: left out {len(unreadable)} unreadable images: {'; '.join(unreadable[:5])}")
