"""Parquet files as Hugging Face datasets writes them, local or on the hub.

They are read by row groups with pyarrow, not with `datasets`: pyarrow gives random access to files on the hub as to
local ones. A data set larger than the disk is therefore read in the same reproducible order, and a run resumes anywhere
without a shuffle buffer's state.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.extras import import_extra
from nextscale.common.fingerprint import fingerprint_files
from nextscale.config.data import ReadConfig
from nextscale.data.images import ImageLike
from nextscale.data.sources.captions import Captions, collect_captions, read_cell
from nextscale.data.sources.columns import (
    Schema,
    find_caption_columns,
    find_image_column,
    find_label_columns,
    read_schema,
)
from nextscale.data.sources.labels import LabelledRows, TableLabels, arrange_tables, parse_split
from nextscale.data.sources.source import MissingColumnError, Unused, shuffle_rows

_GROUPS_IN_MEMORY, _WINDOW = 20, 16


def list_hub_files(name: str) -> list[str]:
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


def has_images(file: str) -> bool:
    """Whether a local parquet file has a column of images. False where pyarrow is not installed or cannot read it."""
    try:
        from pyarrow import ArrowException, parquet

        schema = parquet.read_schema(file)
    except (ImportError, OSError):
        return False
    except ArrowException:
        return False
    try:
        return bool(find_image_column(read_schema(file, schema), ""))
    except UserError:
        return False


def _fingerprint_hub_file(name: str) -> str:
    """The hub's identifier of a file's content, or its size where there is none."""
    from huggingface_hub import HfFileSystem

    info = HfFileSystem().info(name)
    return str(info.get("blob_id") or info.get("size"))


class Parquet:
    """Tables as Hugging Face datasets writes them: a column of images (bytes, or a struct with bytes), one of labels.

    Opening reads only the labels and, with `captioned`, the captions. An image is read together with its row group; the
    latest groups stay in memory. Rows without a label are left out. With `labelled` False all rows are one class, and
    no column of labels is needed; so are those of captioned tables without such a column.
    """

    def __init__(
        self, where: str, files: Sequence[str], root: str, on_hub: bool = False, config: ReadConfig | None = None,
        labelled: bool = True, captioned: bool = False,
    ):  # fmt: skip
        self.where, self.files, self.on_hub, self.config = where, list(files), on_hub, config or ReadConfig()
        self.unused = Unused()
        self.groups: list[tuple[int, int, int, int]] = []  # file, group in the file, first row, rows
        self._recent_groups: OrderedDict[int, Any] = OrderedDict()
        self._open_files: dict[int, Any] = {}
        self._process = os.getpid()
        self._find_groups()
        tables = self._read_labels(root, captioned) if labelled else []
        arranged = arrange_tables(tables, where, self.unused) if labelled else self._arrange_all()
        self.class_names, self.labels, self.splits = arranged.class_names, arranged.labels, arranged.splits
        self._rows = np.array(arranged.rows)  # of all rows, those that have a label
        self._starts = np.array([first for _, _, first, _ in self.groups])
        self.captions = self._read_captions() if captioned else None

    def _find_groups(self) -> None:
        """Find the row groups of all files, and the column of images in each file."""
        self.schemas: list[Schema] = []
        self.columns: list[str] = []
        start = 0
        for number, name in enumerate(self.files):
            table = self._open(number)
            self.schemas.append(read_schema(name, table.schema_arrow))
            self.columns.append(find_image_column(self.schemas[-1], self.config.image_column))
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                self.groups.append((number, group, start, rows))
                start += rows

    def _read_labels(self, root: str, captioned: bool) -> list[TableLabels]:
        """The labels of each file, with the names that the label's own column has. Captioned tables may have none."""
        try:
            labels = find_label_columns(self.schemas, self.columns, self.config.label_column)
        except MissingColumnError as error:
            if error.option or not captioned:
                raise
            return self._label_all(root)
        named = next(filter(None, labels))
        tables = []
        for number, (name, column) in enumerate(zip(self.files, labels, strict=True)):
            values: list[Any] = []
            for file, group, _, rows in self.groups:
                if file == number:
                    values += self._read_column(file, group, column).to_pylist() if column else [None] * rows
            names = self.schemas[number].read_class_names(column)
            tables.append(TableLabels(name, parse_split(name.removeprefix(root)), values, names, column or named))
        return tables

    def _label_all(self, root: str) -> list[TableLabels]:
        """All rows as one class, in the split of their files."""
        counts = [0] * len(self.files)
        for file, _, _, rows in self.groups:
            counts[file] += rows
        name = Path(self.where).stem
        return [
            TableLabels(file, parse_split(file.removeprefix(root)), [name] * count)
            for file, count in zip(self.files, counts, strict=True)
        ]

    def _read_captions(self) -> Captions:
        """The captions of the rows that have a label."""
        columns = find_caption_columns(self.schemas, self.config.caption_column)
        cells: list[Any] = []
        for file, group, _, rows in self.groups:
            column = columns[file]
            cells += self._read_column(file, group, column).to_pylist() if column else [None] * rows
        where = f"{self.where}: column '{next(filter(None, columns))}'"
        rows_of = ((f"row {row}", read_cell(cells[row], where)) for row in self._rows.tolist())
        return collect_captions(rows_of, self.where, self.unused)

    def _arrange_all(self) -> LabelledRows:
        """All rows, as one class. UserError when a column of labels is asked for and there is none."""
        if self.config.label_column:
            find_label_columns(self.schemas, self.columns, self.config.label_column)
        count = sum(rows for _, _, _, rows in self.groups)
        return LabelledRows((Path(self.where).stem,), list(range(count)), [0] * count, {})

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        group, row, name = self._find_row(i)
        cell = self._read_group(group)[row].as_py()
        return name, self._find_image(cell, group, name)

    def _find_row(self, i: int) -> tuple[int, int, str]:
        """The group of a row, its number in the group, and its name."""
        stored = int(self._rows[i])
        group = int(np.searchsorted(self._starts, stored, side="right")) - 1
        return group, stored - int(self._starts[group]), f"{self.where} row {stored}"

    def _find_image(self, cell: Any, group: int, name: str) -> ImageLike | None:
        """The image of a cell: its bytes, else the file that it names. UserError when there is no such file."""
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        path = cell.get("path") if isinstance(cell, dict) else cell
        if isinstance(content, bytes) or not isinstance(path, str) or not path:
            return content if isinstance(content, bytes) else None
        file = None if self.on_hub else self._find_file(path, self.files[self.groups[group][0]])
        if file is None:
            place = "on the hub" if self.on_hub else f"in the folder of {self.files[self.groups[group][0]]}"
            raise UserError(f"{name} holds no bytes, only the path {path}, and there is no such file {place}")
        return file

    def _find_file(self, path: str, table: str) -> Path | None:
        """The file of a path beside a table or below the data set; a path with backslashes is Windows's."""
        folders = dict.fromkeys([Path(table).parent, Path(self.where)])
        spellings = dict.fromkeys([path, path.replace("\\", "/")])
        return next((f / name for f in folders for name in spellings if (f / name).is_file()), None)

    def fingerprint(self) -> dict[str, Any]:
        asked = {"image_column": self.config.image_column} if self.config.image_column else {}
        if self.on_hub:
            return {"kind": "hub", "files": {name: _fingerprint_hub_file(name) for name in self.files}, **asked}
        files = [*map(Path, self.files), *self._list_files()]
        return {"kind": "parquet", **fingerprint_files(files, Path(self.where)), **asked}

    def _list_files(self) -> list[Path]:
        """The image files that rows without bytes name."""
        found: dict[Path, None] = {}
        for file, group, _, _ in self.groups:
            if _lacks_bytes(self._open(file), group, self.columns[file]):
                for cell in self._read_column(file, group, self.columns[file]).to_pylist():
                    path = cell.get("path") if isinstance(cell, dict) else cell
                    image = self._find_file(path, self.files[file]) if isinstance(path, str) and path else None
                    if image is not None:
                        found[image] = None
        return list(found)

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Row groups in random order, and rows shuffled within windows of 16 groups: each group is read about once."""
        stored = self._rows[rows.numpy()]
        group_of = torch.from_numpy(np.searchsorted(self._starts, stored, side="right") - 1)
        rank = torch.randperm(len(self.groups), generator=rng)
        window = rank[group_of] // _WINDOW
        rows_in_window, counts = torch.argsort(window, stable=True), torch.bincount(window)
        return torch.cat([shuffle_rows(rows[index], rng) for index in rows_in_window.split(counts.tolist())])

    def _read_group(self, number: int) -> Any:
        """The images of a row group; the latest groups are kept."""
        if self._process != os.getpid():  # a forked worker must not share its parent's file positions
            self._recent_groups, self._open_files, self._process = OrderedDict(), {}, os.getpid()
        if number not in self._recent_groups:
            file, group, _, _ = self.groups[number]
            self._recent_groups[number] = self._read_column(file, group, self.columns[file])
            if len(self._recent_groups) > _GROUPS_IN_MEMORY:
                self._recent_groups.popitem(last=False)
        self._recent_groups.move_to_end(number)
        return self._recent_groups[number]

    def _read_column(self, file: int, group: int, column: str) -> Any:
        """A column of a row group."""
        table = self._open(file)
        return self._call(
            self.files[file], lambda: table.read_row_group(group, [column]).column(column).combine_chunks()
        )

    def _open(self, number: int) -> Any:
        parquet = import_extra("pyarrow.parquet", "reading parquet")
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


def _lacks_bytes(table: Any, group: int, column: str) -> bool:
    """Whether the images of a row group are all given by their paths, as far as types and statistics tell."""
    from pyarrow import types

    type_ = table.schema_arrow.field(column).type
    if types.is_struct(type_):
        index = type_.get_field_index("bytes")
        type_ = type_.field(index).type if index >= 0 else None
    if type_ is None or not (types.is_binary(type_) or types.is_large_binary(type_)):
        return True
    chunks = table.metadata.row_group(group)
    for chunk in map(chunks.column, range(chunks.num_columns)):
        if chunk.path_in_schema == f"{column}.bytes" and chunk.statistics is not None:
            return chunk.statistics.has_null_count and chunk.statistics.null_count == chunks.num_rows
    return False
