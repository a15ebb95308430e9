"""Folders of image files, with classes as sub-folders or in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.fingerprint import fingerprint_files
from nextscale.config.data import ReadConfig
from nextscale.data.images import ImageLike
from nextscale.data.sources.layout import find_layout
from nextscale.data.sources.source import Unused, shuffle_rows
from nextscale.data.sources.tree import Folder as Tree
from nextscale.data.sources.tree import scan_folder


@dataclass
class Folder:
    """Image files."""

    where: str
    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]
    unused: Unused = field(default_factory=Unused)
    tables: Sequence[Path] = ()
    """Metadata files that list the images."""

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        return str(self.files[i]), self.files[i]

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "folder", **fingerprint_files([*self.files, *self.tables], Path(self.where))}

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


def open_folder(path: Path, config: ReadConfig | None = None, tree: Tree | None = None) -> Folder:
    """The images of a folder in one of the layouts of docs/data.md.

    `tree`: what `scan_folder` returned, where it was called before. Raises UserError in the cases of `find_layout`.
    """
    unused = Unused()
    layout = find_layout(
        tree or scan_folder(path), str(path), path.resolve().name, config or ReadConfig(), unused, path
    )
    files = [path / file for file in layout.files]
    return Folder(str(path), files, layout.labels, layout.class_names, layout.splits, unused, layout.tables)


def open_unlabelled(path: Path, tree: Tree) -> Folder:
    """All images of a folder and the folders below it, as one class. `tree`: what `scan_folder` returned."""
    files = [path / name for name in tree.list_images()]
    return Folder(str(path), files, [0] * len(files), (path.resolve().name,), {})
