"""Folders of image files, with classes as sub-folders or in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.fingerprint import fingerprint_files
from nextscale.common.reading import read_text
from nextscale.config.data import ReadConfig
from nextscale.data.images import ImageLike
from nextscale.data.sources.captions import Captions
from nextscale.data.sources.layout import find_layout
from nextscale.data.sources.source import Unused, shuffle_rows
from nextscale.data.sources.tree import Folder as Tree
from nextscale.data.sources.tree import scan_folder

_LARGEST_TEXT = 2**20


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
    captions: Captions | None = None

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        return str(self.files[i]), self.files[i]

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "folder", **fingerprint_files([*self.files, *self.tables], Path(self.where))}

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


def open_folder(
    path: Path, config: ReadConfig | None = None, tree: Tree | None = None, captioned: bool = False
) -> Folder:
    """The images of a folder in one of the layouts of docs/data.md.

    `tree`: what `scan_folder` returned, where it was called before. `captioned`: read captions, too. Raises UserError
    in the cases of `find_layout`.
    """
    unused = Unused()
    read_lines = (lambda name: read_text(path / name, _LARGEST_TEXT).splitlines()) if captioned else None
    layout = find_layout(
        tree or scan_folder(path), str(path), path.resolve().name, config or ReadConfig(), unused, path, read_lines
    )
    files = [path / file for file in layout.files]
    return Folder(
        str(path), files, layout.labels, layout.class_names, layout.splits, unused, layout.tables, layout.captions
    )


def open_unlabelled(path: Path, tree: Tree) -> Folder:
    """All images of a folder and the folders below it, as one class. `tree`: what `scan_folder` returned."""
    files = [path / name for name in tree.list_images()]
    return Folder(str(path), files, [0] * len(files), (path.resolve().name,), {})
