"""Small labelled image sets held in memory: scikit-learn's digits, a folder of images, a parquet file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nextscale.data.images import ImageLike, fit, load_image
from nextscale.errors import UserError
from nextscale.rng import generator

_SUFFIXES = set(Image.registered_extensions())
_MAX_UNREADABLE = 0.1
_MAX_ENLARGED = 0.5


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

    def __len__(self) -> int:
        return len(self.images_B3HW)

    def say_remarks(self) -> None:
        """Print what a user should know of how the set was read: one line for each kind of trouble."""
        kinds = (("left out {} unreadable images", self.unreadable), ("enlarged {} images too small", self.enlarged))
        for text, names in kinds:
            if names:
                print(f"note: {text.format(len(names))}: {'; '.join(names[:5])}")

    def subset(self, index: Tensor) -> ImageSet:
        return replace(self, images_B3HW=self.images_B3HW[index], labels_B=self.labels_B[index])

    def split(self, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(training, held-out) parts: this share of every class, at least one image where a class has two."""
        order = torch.randperm(len(self), generator=generator(seed, "split"))
        is_held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.class_names)):
            members = order[self.labels_B[order] == label]
            is_held[members[: max(round(held_out * len(members)), int(len(members) > 1))]] = True
        return self.subset(order[~is_held[order]]), self.subset(order[is_held[order]])


def load_images(data: str, size: int, limit: int, seed: int) -> ImageSet:
    """Images of `data` as size x size: "digits", a folder of images, or a .parquet file.

    In a folder each sub-folder is a class; images without sub-folders are one class of the folder's name. At most
    `limit` images, chosen from `seed`. Unreadable files are left out and named in the result, and so are those that
    had to be enlarged; UserError when more than a tenth are unreadable, more than half smaller than `size`, when
    nothing is left, or when `data` is none of the three.
    """
    if data == "digits":
        digits = _digits(size)
        return digits.subset(_choose(len(digits), limit, seed))
    path = Path(data)
    if path.is_dir():
        sources, labels, names = _folder(path)
    elif path.suffix == ".parquet" and path.is_file():
        sources, labels, names = _parquet(path)
    else:
        raise UserError(
            f"--data {data} is neither 'digits', a folder of images or of class sub-folders, nor a .parquet file"
        )
    chosen = _choose(len(labels), limit, seed).tolist()
    return _read([(*sources(i), labels[i]) for i in chosen], names, size, str(path))


def _choose(count: int, limit: int, seed: int) -> Tensor:
    """Which of `count` images to use, in order."""
    return torch.randperm(count, generator=generator(seed, "limit"))[:limit].sort().values


def _digits(size: int) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys, enlarged (bicubic) to the size."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the bundled digits come with scikit-learn: pip install 'nextscale[quickstart]'") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pixels]
    images = torch.from_numpy(np.stack(enlarged)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, torch.from_numpy(digits.target).long(), tuple(map(str, range(10))))


Source = Callable[[int], tuple[str, ImageLike | None]]


def _folder(path: Path) -> tuple[Source, list[int], tuple[str, ...]]:
    files: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = _pictures(folder.rglob("*"))
        if found:  # an empty folder would become a class that nothing is known of
            labels += [len(names)] * len(found)
            files += found
            names.append(folder.name)
    loose = _pictures(path.iterdir())
    if not files and not loose:
        raise UserError(
            f"{path} has no images; expected {path}/CLASS/IMAGE.png and the like, or images without classes"
        )
    if files and loose:
        raise UserError(
            f"{path} has both class sub-folders ({', '.join(names[:3])}) and {len(loose)} images outside them "
            f"({loose[0].name}): move these into a class, or away"
        )
    if loose:
        files, labels, names = loose, [0] * len(loose), [path.resolve().name]
    return lambda i: (str(files[i]), files[i]), labels, tuple(names)


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(f for f in paths if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".") and f.is_file())


def _parquet(path: Path) -> tuple[Source, list[int], tuple[str, ...]]:
    """A table as Hugging Face datasets writes it: column `image` (bytes, or a struct with bytes), column `label`."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow: pip install 'nextscale[data]'") from None
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no parquet file: {str(error).splitlines()[0]}") from error
    for column in ("image", "label"):
        if column not in table.column_names:
            raise UserError(f"{path} has no column '{column}'; it has {', '.join(table.column_names)}")
    images, raw = table.column("image"), table.column("label").to_pylist()
    if not raw or any(not isinstance(label, int | str) for label in raw):
        raise UserError(
            f"{path}: column 'label' must hold a whole number or a text in every row, and there must be rows"
        )
    names, labels = _label_names(table.schema.metadata or {}, raw)

    def source(i: int) -> tuple[str, ImageLike | None]:
        cell = images[i].as_py()
        return f"{path} row {i}", cell.get("bytes") if isinstance(cell, dict) else cell

    return source, labels, names


def _label_names(metadata: dict[bytes, bytes], raw: list) -> tuple[tuple[str, ...], list[int]]:
    """Class names from the file's ClassLabel feature, else the labels themselves in order."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in raw):
        return tuple(names), raw
    values = sorted(set(raw))
    return tuple(map(str, values)), [values.index(v) for v in raw]


def _read(items: list[tuple[str, ImageLike | None, int]], names: tuple[str, ...], size: int, where: str) -> ImageSet:
    images, labels, unreadable, enlarged = [], [], [], []
    for name, source, label in _progress(items):
        if not isinstance(source, str | Path | bytes):
            unreadable.append(f"{name} (it holds no image)")
            continue
        try:
            image = load_image(source)
            images.append(torch.from_numpy(np.array(fit(image, (size, size)))))
            labels.append(label)
            if min(image.size) < size:
                enlarged.append(f"{name} ({image.width} x {image.height})")
        except UserError as error:
            unreadable.append(f"{name} ({error})" if isinstance(source, bytes) else str(error))
    if not images or len(unreadable) > _MAX_UNREADABLE * len(items):
        some = "; ".join(unreadable[:3])
        raise UserError(f"{len(unreadable)} of {len(items)} images in {where} cannot be read: {some}")
    if len(enlarged) > _MAX_ENLARGED * len(images):
        raise UserError(
            f"{len(enlarged)} of {len(images)} images in {where} are smaller than the model's {size} x {size}, such as "
            f"{enlarged[0]}: a model of them would learn to blur; choose a smaller size, or larger images"
        )
    stacked = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(stacked, torch.tensor(labels), names, tuple(unreadable), tuple(enlarged))


def _progress(items: list) -> Iterator:
    yield from tqdm(items, desc="reading images", unit="image", disable=len(items) < 500)
