"""Where images and labels are stored: a folder, local or remote parquet files, or scikit-learn's digits.

A source lists all labels at once and returns encoded images one by one. Parquet is read by row groups with pyarrow, not
with `datasets`: pyarrow gives random access to files on the Hugging Face hub as to local ones. A data set larger than
the disk is therefore read in the same reproducible order, and a run resumes anywhere without a shuffle buffer's state.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name
from nextscale.data.images import ImageLike

_SUFFIXES = set(Image.registered_extensions())
_TRAIN, _HELD_OUT = ("train", "training"), ("validation", "valid", "val", "dev", "test")
_GROUPS_IN_MEMORY, _WINDOW = 20, 16


class Source(Protocol):
    """Encoded images by row."""

    where: str
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]
    """Rows of the data set's own split, {"train": ..., "held_out": ...}; {} where it has none."""

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        """Name and encoded image of row i; None when the row holds no image."""

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """These rows shuffled, as far as the storage allows random access."""


def shuffle_rows(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Rows in random order."""
    return rows[torch.randperm(len(rows), generator=rng)]


def open_source(data: str, size: int) -> Source:
    """The images of `data`: "digits" (enlarged to `size` pixels), a folder, a .parquet file, or owner/name on the hub.

    Raises UserError when it is none of these, when it holds no images, or when a parquet column is missing.
    """
    if data == "digits":
        return Digits(size)
    path = Path(data)
    if path.is_dir():
        tables = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
        has_classes = any(_list_images(p.iterdir()) for p in path.iterdir() if p.is_dir())
        return Parquet(data, [str(t) for t in tables], data) if tables and not has_classes else open_folder(path)
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(data, [data], data)
    if is_hub_name(data) and not path.suffix:
        return Parquet(data, _list_hub_files(data), f"datasets/{data}", on_hub=True)
    raise UserError(
        f"{data} is neither 'digits', a folder of images, of class sub-folders or of .parquet files, "
        "a .parquet file, nor owner/name on the Hugging Face hub"
    )


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels with 17 grey levels."""

    size: int
    where: str = "digits"
    class_names: tuple[str, ...] = tuple(map(str, range(10)))
    splits: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("the bundled digits come with scikit-learn: pip install 'nextscale[quickstart]'") from None
        digits = load_digits()
        self._pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.labels = digits.target.tolist()

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        scan = Image.fromarray(self._pixels[i])
        return f"digit {i}", scan.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


@dataclass
class Folder:
    """Image files."""

    where: str
    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        return str(self.files[i]), self.files[i]

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


def open_folder(path: Path) -> Folder:
    """A folder with PATH/CLASS/IMAGE, PATH/IMAGE (one class, named after the folder) or PATH/metadata.csv; or with one
    of these below PATH/train and PATH/validation."""
    subfolders = {p.name: p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    training = next((subfolders[n] for n in _TRAIN if n in subfolders), None)
    held_out = next((subfolders[n] for n in _HELD_OUT if n in subfolders), None)
    if training is None or held_out is None:
        files, names = _list_labelled_files(path)
        return Folder(str(path), [f for f, _ in files], [names.index(n) for _, n in files], names, {})
    train_files, names = _list_labelled_files(training)
    held_out_files, held_out_names = _list_labelled_files(held_out)
    unknown = sorted(set(held_out_names) - set(names))
    if unknown:
        raise UserError(f"{held_out} has classes that {training} does not have: {', '.join(unknown[:5])}")
    files = [*train_files, *held_out_files]
    splits = {"train": list(range(len(train_files))), "held_out": list(range(len(train_files), len(files)))}
    return Folder(str(path), [f for f, _ in files], [names.index(n) for _, n in files], names, splits)


def _list_labelled_files(path: Path) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """Files with their class, and the names of the classes in order."""
    listed = _read_metadata(path)
    if listed:
        return listed, tuple(sorted({name for _, name in listed}))
    files: list[tuple[Path, str]] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files += [(f, folder.name) for f in _list_images(folder.rglob("*"))]
    unlabelled = _list_images(path.iterdir())
    if not files and not unlabelled:
        raise UserError(
            f"{path} has no images; expected {path}/CLASS/IMAGE.png and the like, or images without classes"
        )
    if files and unlabelled:
        raise UserError(
            f"{path} has both class sub-folders ({files[0][1]}, ...) and {len(unlabelled)} images outside them "
            f"({unlabelled[0].name}): move these into a class, or away"
        )
    files = files or [(f, path.resolve().name) for f in unlabelled]
    return files, tuple(sorted({name for _, name in files}))  # an empty folder is not counted as a class


def _read_metadata(path: Path) -> list[tuple[Path, str]]:
    """Files and labels listed in metadata.csv or metadata.jsonl (Hugging Face's imagefolder); [] without one."""
    table = next((f for f in (path / "metadata.csv", path / "metadata.jsonl") if f.is_file()), None)
    if table is None:
        return []
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if table.suffix == ".csv" else [json.loads(line) for line in file if line]
        label = next((n for n in ("label", "labels") if n in rows[0]), None)
        files = [(path / row["file_name"], path.resolve().name if label is None else str(row[label])) for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{table} must list file_name and label in every row: {error!r}") from error
    absent = [str(f) for f, _ in files if not f.is_file()]
    if absent:
        raise UserError(f"{table} lists {len(absent)} files that do not exist, such as {absent[0]}")
    return sorted(files)


def _list_images(paths: Iterable[Path]) -> list[Path]:
    return sorted(f for f in paths if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".") and f.is_file())


def _list_hub_files(name: str) -> list[str]:
    """Parquet files of a data set on the hub: its own, else those that the hub converted."""
    from huggingface_hub import HfFileSystem

    try:
        system = HfFileSystem()
        for revision in ("", "@refs%2Fconvert%2Fparquet"):
            found = system.glob(f"datasets/{name}{revision}/**/*.parquet")
            if found:
                return sorted(map(str, found))
    except Exception as error:  # the hub's client raises many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"there is no folder {name}, and the hub gave no data set of that name: {reason}") from error
    raise UserError(f"the hub's data set {name} has no parquet files")


class Parquet:
    """Tables as Hugging Face datasets writes them: a column of images (bytes, or a struct with bytes), one of labels.

    Opening reads only the labels. An image is read together with its row group; the latest groups stay in memory.
    """

    def __init__(self, where: str, files: Sequence[str], root: str, on_hub: bool = False):
        self.where, self.files, self.on_hub = where, list(files), on_hub
        self.groups: list[tuple[int, int, int, int]] = []  # file, group in the file, first row, rows
        self._recent_groups: OrderedDict[int, Any] = OrderedDict()
        self._open_files: dict[int, Any] = {}
        self._process = os.getpid()
        raw: list[Any] = []
        metadata: dict[bytes, bytes] = {}
        rows_by_split: dict[str, list[int]] = {}
        for number, name in enumerate(self.files):
            table = self._open(number)
            self.column = _find_column(name, table, ("image", "img"))
            label = _find_column(name, table, ("label", "labels"))
            start = len(raw)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                self.groups.append((number, group, len(raw), rows))
                raw += self._call(name, lambda t=table, g=group, c=label: t.read_row_group(g, [c])[c].to_pylist())
            metadata = metadata or table.schema_arrow.metadata or {}
            rows_by_split.setdefault(_parse_split(name.removeprefix(root)), []).extend(range(start, len(raw)))
        if not raw or any(not isinstance(value, int | str) for value in raw):
            raise UserError(
                f"{where}: column 'label' must hold a whole number or a text in every row, and there must be rows"
            )
        held_out = next((split for split in _HELD_OUT if split in rows_by_split), None)
        self.splits = {}
        if held_out and "train" in rows_by_split and "" not in rows_by_split:
            self.splits = {"train": rows_by_split["train"], "held_out": rows_by_split[held_out]}
        self.class_names, self.labels = _name_classes(metadata, raw)
        self._starts = np.array([first for _, _, first, _ in self.groups])

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        cell = self._read_group(group)[i - int(self._starts[group])].as_py()
        image = cell.get("bytes") if isinstance(cell, dict) else cell
        return f"{self.where} row {i}", image if isinstance(image, bytes | str) else None

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Row groups in random order, and rows shuffled within windows of 16 groups: each group is read about once."""
        group_of = torch.from_numpy(np.searchsorted(self._starts, rows.numpy(), side="right") - 1)
        rank = torch.randperm(len(self.groups), generator=rng)
        window = rank[group_of] // _WINDOW
        rows_in_window, counts = torch.argsort(window, stable=True), torch.bincount(window)
        return torch.cat([shuffle_rows(rows[index], rng) for index in rows_in_window.split(counts.tolist())])

    def _read_group(self, number: int) -> Any:
        if self._process != os.getpid():  # a forked worker must not share its parent's file positions
            self._recent_groups, self._open_files, self._process = OrderedDict(), {}, os.getpid()
        if number not in self._recent_groups:
            file, group, _, _ = self.groups[number]
            table = self._open(file)
            self._recent_groups[number] = self._call(
                self.files[file], lambda: table.read_row_group(group, [self.column]).column(0).combine_chunks()
            )
            if len(self._recent_groups) > _GROUPS_IN_MEMORY:
                self._recent_groups.popitem(last=False)
        self._recent_groups.move_to_end(number)
        return self._recent_groups[number]

    def _open(self, number: int) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError("reading parquet needs pyarrow: pip install 'nextscale[data]'") from None
        if number not in self._open_files:
            name = self.files[number]
            self._open_files[number] = self._call(name, lambda: parquet.ParquetFile(self._open_stream(name)))
        return self._open_files[number]

    def _open_stream(self, name: str) -> Any:
        if not self.on_hub:
            return name
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(name)

    def _call(self, name: str, action: Any) -> Any:
        """The result of a read; UserError naming the file when it is damaged."""
        import pyarrow as arrow

        try:
            return action()
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{name} is damaged or no parquet file: {str(error).splitlines()[0]}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent_groups": OrderedDict(), "_open_files": {}}


def _find_column(name: str, table: Any, candidates: tuple[str, ...]) -> str:
    names = table.schema_arrow.names
    for column in candidates:
        if column in names:
            return column
    raise UserError(f"{name} has no column '{candidates[0]}'; it has {', '.join(names)}")


def _parse_split(name: str) -> str:
    """The split in a file's name, as in train-00000-of-00004.parquet or data/test/0.parquet; "" where it has none."""
    words = re.split(r"[/\\._-]", name.lower())
    if any(word in _TRAIN for word in words):
        return "train"
    return next((split for split in _HELD_OUT if split in words), "")


def _name_classes(metadata: dict[bytes, bytes], raw: list) -> tuple[tuple[str, ...], list[int]]:
    """(class names, label of each row), from the file's ClassLabel feature, else from the sorted distinct values."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = next((f["names"] for f in features.values() if isinstance(f, dict) and f.get("names")), None)
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in raw):
        return tuple(names), raw
    values = sorted(set(raw))
    number = {value: i for i, value in enumerate(values)}
    return tuple(map(str, values)), [number[v] for v in raw]
