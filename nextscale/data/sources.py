"""Where pictures and their labels are: a folder, parquet files here or on the Hugging Face hub, scikit-learn's digits.

A source lists labels at once and hands out encoded pictures one by one. Parquet is read by row groups with pyarrow, not
with `datasets`: that gives the same random access to a file on the hub as to a local one, so a set that outgrows the
disk is read in the same reproducible order, and an interrupted run goes on anywhere, without a shuffle buffer's state.
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
from nextscale.common.files import is_hub_name
from nextscale.data.images import ImageLike

_SUFFIXES = set(Image.registered_extensions())
_TRAIN, _HELD_OUT = ("train", "training"), ("validation", "valid", "val", "dev", "test")
_GROUPS_IN_MEMORY, _WINDOW = 20, 16


class Source(Protocol):
    """Pictures by number. `parts`: rows of the split that the data came with, {"train": ..., "held_out": ...} or {}."""

    where: str
    labels: list[int]
    class_names: tuple[str, ...]
    parts: dict[str, list[int]]

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        """Name and encoded picture of row i; None when the row holds none."""

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """These rows shuffled, as far as the storage can be read in any order."""


def shuffled(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Rows in random order."""
    return rows[torch.randperm(len(rows), generator=rng)]


def open_source(data: str, size: int) -> Source:
    """The pictures of `data`: "digits" (drawn at `size` pixels), a folder, a .parquet file, or owner/name on the hub.

    Raises UserError when it is none of these, when it holds no pictures, or when parquet columns are amiss.
    """
    if data == "digits":
        return Digits(size)
    path = Path(data)
    if path.is_dir():
        tables = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
        has_classes = any(_pictures(p.iterdir()) for p in path.iterdir() if p.is_dir())
        return Parquet(data, [str(t) for t in tables], data) if tables and not has_classes else folder_source(path)
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(data, [data], data)
    if is_hub_name(data) and not path.suffix:
        return Parquet(data, _hub_files(data), f"datasets/{data}", on_hub=True)
    raise UserError(
        f"{data} is neither 'digits', a folder of images, of class sub-folders or of .parquet files, "
        "a .parquet file, nor owner/name on the Hugging Face hub"
    )


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys."""

    size: int
    where: str = "digits"
    class_names: tuple[str, ...] = tuple(map(str, range(10)))
    parts: dict[str, list[int]] = field(default_factory=dict)

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
        return shuffled(rows, rng)


@dataclass
class Folder:
    """Picture files."""

    where: str
    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]
    parts: dict[str, list[int]]

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        return str(self.files[i]), self.files[i]

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffled(rows, rng)


def folder_source(path: Path) -> Folder:
    """PATH/CLASS/IMAGE, PATH/IMAGE (one class of the folder's name) or what PATH/metadata.csv lists; or each of these
    below PATH/train and PATH/validation."""
    subfolders = {p.name: p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    training = next((subfolders[n] for n in _TRAIN if n in subfolders), None)
    held_out = next((subfolders[n] for n in _HELD_OUT if n in subfolders), None)
    if training is None or held_out is None:
        files, names = _classes(path)
        return Folder(str(path), [f for f, _ in files], [names.index(n) for _, n in files], names, {})
    parts, names = [_classes(training), _classes(held_out)], _classes(training)[1]
    unknown = sorted(set(parts[1][1]) - set(names))
    if unknown:
        raise UserError(f"{held_out} has classes that {training} has not: {', '.join(unknown[:5])}")
    files = [*parts[0][0], *parts[1][0]]
    rows = {"train": list(range(len(parts[0][0]))), "held_out": list(range(len(parts[0][0]), len(files)))}
    return Folder(str(path), [f for f, _ in files], [names.index(n) for _, n in files], names, rows)


def _classes(path: Path) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """Files with their class, and the names of the classes in order."""
    listed = _listed(path)
    if listed:
        return listed, tuple(sorted({name for _, name in listed}))
    files: list[tuple[Path, str]] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files += [(f, folder.name) for f in _pictures(folder.rglob("*"))]
    loose = _pictures(path.iterdir())
    if not files and not loose:
        raise UserError(
            f"{path} has no images; expected {path}/CLASS/IMAGE.png and the like, or images without classes"
        )
    if files and loose:
        raise UserError(
            f"{path} has both class sub-folders ({files[0][1]}, ...) and {len(loose)} images outside them "
            f"({loose[0].name}): move these into a class, or away"
        )
    files = files or [(f, path.resolve().name) for f in loose]
    return files, tuple(sorted({name for _, name in files}))  # an empty folder is no class: nothing is known of it


def _listed(path: Path) -> list[tuple[Path, str]]:
    """Files and labels that metadata.csv or metadata.jsonl lists (Hugging Face's imagefolder); none without one."""
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
        raise UserError(f"{table} lists {len(absent)} files that are not there, such as {absent[0]}")
    return sorted(files)


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(f for f in paths if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".") and f.is_file())


def _hub_files(name: str) -> list[str]:
    """Parquet files of a data set on the hub: its own, else those that the hub made of it."""
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
    """Tables as Hugging Face datasets writes them: a column of pictures (bytes, or a struct with bytes), one of labels.

    Only the labels are read at first. A row's picture is read with its row group; the latest groups stay in memory.
    """

    def __init__(self, where: str, files: Sequence[str], root: str, on_hub: bool = False):
        self.where, self.files, self.on_hub = where, list(files), on_hub
        self.groups: list[tuple[int, int, int, int]] = []  # file, group in it, first row, rows
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._handles: dict[int, Any] = {}
        self._owner = os.getpid()
        raw: list[Any] = []
        metadata: dict[bytes, bytes] = {}
        rows_of: dict[str, list[int]] = {}
        for number, name in enumerate(self.files):
            table = self._open(number)
            self.column, label = _column(name, table, ("image", "img")), _column(name, table, ("label", "labels"))
            start = len(raw)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                self.groups.append((number, group, len(raw), rows))
                raw += self._guard(name, lambda t=table, g=group, c=label: t.read_row_group(g, [c])[c].to_pylist())
            metadata = metadata or table.schema_arrow.metadata or {}
            rows_of.setdefault(_part(name.removeprefix(root)), []).extend(range(start, len(raw)))
        if not raw or any(not isinstance(value, int | str) for value in raw):
            raise UserError(
                f"{where}: column 'label' must hold a whole number or a text in every row, and there must be rows"
            )
        held_out = next((p for p in _HELD_OUT if p in rows_of), None)
        self.parts = {}
        if held_out and "train" in rows_of and "" not in rows_of:
            self.parts = {"train": rows_of["train"], "held_out": rows_of[held_out]}
        self.class_names, self.labels = _label_names(metadata, raw)
        self._starts = np.array([first for _, _, first, _ in self.groups])

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        cell = self._group(group)[i - int(self._starts[group])].as_py()
        picture = cell.get("bytes") if isinstance(cell, dict) else cell
        return f"{self.where} row {i}", picture if isinstance(picture, bytes | str) else None

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Row groups in random order, and rows within windows of some groups: each group is read about once."""
        group_of = torch.from_numpy(np.searchsorted(self._starts, rows.numpy(), side="right") - 1)
        rank = torch.randperm(len(self.groups), generator=rng)
        window = rank[group_of] // _WINDOW
        rows_in_window, counts = torch.argsort(window, stable=True), torch.bincount(window)
        return torch.cat([shuffled(rows[part], rng) for part in rows_in_window.split(counts.tolist())])

    def _group(self, number: int) -> Any:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file positions
            self._recent, self._handles, self._owner = OrderedDict(), {}, os.getpid()
        if number not in self._recent:
            file, group, _, _ = self.groups[number]
            table = self._open(file)
            self._recent[number] = self._guard(
                self.files[file], lambda: table.read_row_group(group, [self.column]).column(0).combine_chunks()
            )
            if len(self._recent) > _GROUPS_IN_MEMORY:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]

    def _open(self, number: int) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError("reading parquet needs pyarrow: pip install 'nextscale[data]'") from None
        if number not in self._handles:
            name = self.files[number]
            self._handles[number] = self._guard(name, lambda: parquet.ParquetFile(self._stream(name)))
        return self._handles[number]

    def _stream(self, name: str) -> Any:
        if not self.on_hub:
            return name
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(name)

    def _guard(self, name: str, action: Any) -> Any:
        import pyarrow as arrow

        try:
            return action()
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{name} is damaged or no parquet file: {str(error).splitlines()[0]}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict(), "_handles": {}}


def _column(name: str, table: Any, wanted: tuple[str, ...]) -> str:
    names = table.schema_arrow.names
    for column in wanted:
        if column in names:
            return column
    raise UserError(f"{name} has no column '{wanted[0]}'; it has {', '.join(names)}")


def _part(name: str) -> str:
    """Which part a file's name says it is of, as in train-00000-of-00004.parquet or data/test/0.parquet; "" unknown."""
    words = re.split(r"[/\\._-]", name.lower())
    if any(word in _TRAIN for word in words):
        return "train"
    return next((part for part in _HELD_OUT if part in words), "")


def _label_names(metadata: dict[bytes, bytes], raw: list) -> tuple[tuple[str, ...], list[int]]:
    """Class names from the file's ClassLabel feature, else the labels themselves in order."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = next((f["names"] for f in features.values() if isinstance(f, dict) and f.get("names")), None)
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in raw):
        return tuple(names), raw
    values = sorted(set(raw))
    number = {value: i for i, value in enumerate(values)}
    return tuple(map(str, values)), [number[v] for v in raw]
