"""Parquet files as Hugging Face datasets writes them, local or on the hub.

They are read by row groups with pyarrow, not with `datasets`: pyarrow gives random access to files on the hub as to
local ones. A data set larger than the disk is therefore read in the same reproducible order, and a run resumes anywhere
without a shuffle buffer's state.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_files
from nextscale.common.reading import parse_json
from nextscale.data.images import ImageLike
from nextscale.data.sources.source import HELD_OUT, TRAIN, shuffle_rows

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


def _fingerprint_hub_file(name: str) -> str:
    """The hub's identifier of a file's content, or its size where there is none."""
    from huggingface_hub import HfFileSystem

    info = HfFileSystem().info(name)
    return str(info.get("blob_id") or info.get("size"))


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
        held_out = next((split for split in HELD_OUT if split in rows_by_split), None)
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

    def fingerprint(self) -> dict[str, Any]:
        if self.on_hub:
            return {"kind": "hub", "files": {name: _fingerprint_hub_file(name) for name in self.files}}
        return {"kind": "parquet", **fingerprint_files(map(Path, self.files), Path(self.where))}

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
    if any(word in TRAIN for word in words):
        return "train"
    return next((split for split in HELD_OUT if split in words), "")


def _name_classes(metadata: dict[bytes, bytes], raw: list) -> tuple[tuple[str, ...], list[int]]:
    """(class names, label of each row), from the file's ClassLabel feature, else from the sorted distinct values."""
    features = parse_json(metadata.get(b"huggingface", b"{}"), "its metadata").get("info", {}).get("features", {})
    names = next((f["names"] for f in features.values() if isinstance(f, dict) and f.get("names")), None)
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in raw):
        return tuple(names), raw
    values = sorted(set(raw))
    number = {value: i for i, value in enumerate(values)}
    return tuple(map(str, values)), [number[v] for v in raw]
