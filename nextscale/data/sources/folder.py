"""Folders of image files, with classes as sub-folders or in a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_files
from nextscale.common.reading import parse_json
from nextscale.data.images import ImageLike
from nextscale.data.sources.source import HELD_OUT, TRAIN, shuffle_rows

_SUFFIXES = set(Image.registered_extensions())


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

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "folder", **fingerprint_files(self.files, Path(self.where))}

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


def open_folder(path: Path) -> Folder:
    """A folder with PATH/CLASS/IMAGE, PATH/IMAGE (one class, named after the folder) or PATH/metadata.csv; or with one
    of these below PATH/train and PATH/validation."""
    subfolders = {p.name: p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    training = next((subfolders[n] for n in TRAIN if n in subfolders), None)
    held_out = next((subfolders[n] for n in HELD_OUT if n in subfolders), None)
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
        files += [(f, folder.name) for f in list_images(folder.rglob("*"))]
    unlabelled = list_images(path.iterdir())
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
            jsonl = table.suffix == ".jsonl"
            rows = [parse_json(line, str(table)) for line in file if line] if jsonl else list(csv.DictReader(file))
        label = next((n for n in ("label", "labels") if n in rows[0]), None)
        files = [(path / row["file_name"], path.resolve().name if label is None else str(row[label])) for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{table} must list file_name and label in every row: {error!r}") from error
    absent = [str(f) for f, _ in files if not f.is_file()]
    if absent:
        raise UserError(f"{table} lists {len(absent)} files that do not exist, such as {absent[0]}")
    return sorted(files)


def list_images(paths: Iterable[Path]) -> list[Path]:
    return sorted(f for f in paths if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".") and f.is_file())
