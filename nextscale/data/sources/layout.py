"""What the folders of a data set mean: classes, splits, or neither.

The rules, with a picture of each, are in docs/data.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from nextscale.common.errors import UserError
from nextscale.config.classes import list_names
from nextscale.config.data import ReadConfig
from nextscale.data.sources.captions import CAPTION_SUFFIX, Captions, collect_captions
from nextscale.data.sources.metadata import TABLES, ListedFile, Metadata, read_metadata
from nextscale.data.sources.source import HELD_OUT, TRAIN, MissingColumnError, Unused
from nextscale.data.sources.tree import Folder

_Row = tuple[str, str]
"""An image's path below the data set, and its class."""
ReadLines = Callable[[str], list[str]]
"""The lines of a file of text, by its path below the data set."""


@dataclass
class Layout:
    """The images of a data set in order, their classes and their split."""

    files: list[str]
    """Paths below the data set, or absolute ones."""
    labels: list[int]
    class_names: tuple[str, ...]
    splits: dict[str, list[int]]
    tables: list[Path] = field(default_factory=list)
    """Metadata files that were read."""
    captions: Captions | None = None
    """None where they were not asked for."""


def find_layout(
    tree: Folder, where: str, set_name: str, config: ReadConfig, unused: Unused, path: Path | None = None,
    read_lines: ReadLines | None = None,
) -> Layout:  # fmt: skip
    """Understand a tree of images. What it leaves out is added to `unused`.

    `where`: for messages. `set_name`: class of images without classes. `path`: the folder, where the tree is one, to
    read its metadata files. `read_lines`: reads captions from .txt files beside the images; None: captions are not
    asked for. Raises UserError when the tree can be understood in several ways, when it has no images, when a class has
    none and `config` does not allow that, or when captions are asked for and there are none.
    """
    reader = _LayoutReader(where, set_name, config, unused, path, read_lines is not None)
    layout = reader.read_tree(tree)
    if read_lines is not None:
        layout.captions = reader.read_captions(tree, layout, read_lines)
    reader.note_unused(tree, layout)
    return layout


@dataclass
class _Part:
    """The images of a split, or of all."""

    prefix: str
    rows: list[_Row]
    class_names: set[str]


class _LayoutReader:
    def __init__(
        self, where: str, set_name: str, config: ReadConfig, unused: Unused, path: Path | None, captioned: bool
    ):
        self.where, self.set_name, self.config, self.unused, self.path = where, set_name, config, unused, path
        self.captioned = captioned
        self.listed_captions: dict[str, tuple[str, ...]] = {}
        """Those of images in tables that have a column of captions."""
        self.tables: list[Path] = []
        self.prefixes: list[str] = []
        """Where class folders stand."""
        self.accounted: set[str] = set()
        """Images that are left out and were added to `unused`, and files of captions that were read."""

    def read_tree(self, tree: Folder, prefix: str = "") -> Layout:
        """Find where the classes or splits are, and read them."""
        metadata = self._read_table(tree, prefix, optional=_has_both_splits(tree))
        if metadata:
            return self._arrange_listed(metadata, prefix)
        parts = self._find_splits(tree, prefix)
        if parts:
            train, *held_out = [self._read_part(folder, below) for folder, below in parts]
            return self._arrange_parts(train, held_out[0] if held_out else None)
        inner, below = self._find_inner(tree, prefix)
        if inner is not tree:
            self.unused.remark(f"{self.where}: classes are read from its folder {below}")
            return self.read_tree(inner, below)
        return self._arrange_parts(self._read_part(tree, prefix), None)

    # ---- tables

    def _read_table(self, tree: Folder, prefix: str, optional: bool = False) -> Metadata | None:
        """The metadata file of a folder. With `optional`, only one that has labels."""
        found = [name for table in TABLES for name in tree.others if name.lower() == table]
        if self.path is None or not found:
            return None
        unused = Unused()
        metadata = read_metadata(self.path / prefix / found[0], self.config, unused, self.captioned)
        if optional and not metadata.label_column:
            return None
        self.unused.update(unused)
        self.accounted.update(self._relate(file) for file in metadata.left_out)
        if metadata.caption_column:
            self.listed_captions.update({self._relate(row.file): row.captions for row in metadata.rows})
        elif not metadata.label_column and len(metadata.columns) > 1:
            self.unused.remark(
                f"{metadata.path} has no column label (it has {', '.join(metadata.columns)}): all images are one "
                "class; choose a column with --images.label-column"
            )
        self.tables.append(metadata.path)
        return metadata

    def _list_rows(self, rows: list[ListedFile]) -> list[_Row]:
        """Rows of a table in the order of their files."""
        ordered = sorted((row.file, self.set_name if row.label is None else row.label) for row in rows)
        return [(self._relate(file), label) for file, label in ordered]

    def _relate(self, file: Path) -> str:
        """The path of a file below the data set, or an absolute one."""
        assert self.path is not None, "tables are files of a folder"
        return file.relative_to(self.path).as_posix() if file.is_relative_to(self.path) else str(file)

    def _arrange_listed(self, metadata: Metadata, prefix: str) -> Layout:
        """The images of a table, in the parts of its split."""
        self.prefixes.append(prefix)
        present = {row.split for row in metadata.rows}
        held_out = next((name for name in HELD_OUT if name in present), None)
        if not present & set(TRAIN) or held_out is None:
            rows = self._list_rows(metadata.rows)
            return self._arrange_parts(_Part(prefix, rows, {label for _, label in rows}), None)
        parts = []
        for names in (TRAIN, (held_out,)):
            rows = self._list_rows([row for row in metadata.rows if row.split in names])
            parts.append(_Part(f"{names[0]} of {metadata.path.name}", rows, {label for _, label in rows}))
        for row in metadata.rows:
            if row.split not in (*TRAIN, held_out):
                self.unused.add("images of further splits", row.split, str(row.file))
                self.accounted.add(self._relate(row.file))
        return self._arrange_parts(*parts)

    # ---- splits

    def _find_splits(self, tree: Folder, prefix: str) -> list[tuple[Folder, str]]:
        """[training, held-out] folders, one folder that has all images, or [] when no folder is a split."""
        named: dict[str, Folder] = {}
        for folder in tree.folders.values():
            key = folder.name.lower()
            if key in TRAIN or key in HELD_OUT:
                if key in named:
                    raise UserError(f"{self._name(prefix)} has both {named[key].name} and {folder.name}: keep one")
                named[key] = folder
        train = next((named[name] for name in TRAIN if name in named), None)
        held_out = [named[name] for name in HELD_OUT if name in named]
        if train and held_out:
            beside = [f for f in tree.folders.values() if f.count and f.name not in {n.name for n in named.values()}]
            if beside and not self._has_labels(train):
                self._refuse_split(prefix, train, [*held_out, *beside])
            return self._pair_splits(train, held_out, prefix)
        if not named or not any(folder.count for folder in named.values()):
            return []
        return self._judge_lone_split(tree, list(named.values()), prefix)

    def _pair_splits(self, train: Folder, held_out: list[Folder], prefix: str) -> list[tuple[Folder, str]]:
        empty = [folder for folder in (train, *held_out) if not folder.count]
        if empty and (empty[0] is train or not self.config.allow_empty_classes):
            raise UserError(
                f"{self._name(prefix + empty[0].name)} has no images: add images to it or remove it; images without a "
                "split are divided by --images.held-out"
            )
        usable = [f for f in held_out if f.count and (self._has_labels(f) or not self._has_labels(train))]
        parts = [train, *usable[:1]]
        for folder in held_out:
            if folder not in parts:
                reason = "images of further splits" if folder in usable else "images of a split without classes"
                files = list(folder.list_images(f"{prefix}{folder.name}/"))
                self.unused.add(reason, folder.name, files[0] if files else "", len(files))
                self.accounted.update(files)
        return [(folder, f"{prefix}{folder.name}/") for folder in parts]

    def _has_labels(self, folder: Folder) -> bool:
        has_table = any(name.lower() in TABLES for name in folder.others)
        return has_table or any(sub.count for sub in folder.folders.values())

    def _judge_lone_split(self, tree: Folder, named: list[Folder], prefix: str) -> list[tuple[Folder, str]]:
        """Folders named as splits without a counterpart: the whole set, or classes that have such names."""
        others = [folder for folder in tree.folders.values() if folder.count and folder not in named]
        filled = [folder for folder in named if folder.count]
        if len(filled) == 1 and not others and not tree.images:
            self.unused.remark(f"{self.where} has only the split {filled[0].name}: all its images are one set")
            return [(filled[0], f"{prefix}{filled[0].name}/")]
        if others and all(folder.images for folder in filled):
            names = list_names([folder.name for folder in filled])
            self.unused.remark(f"{self.where}: {names} is read as a class beside {others[0].name}, not as a split")
            return []
        if tree.images and not others:
            return []
        self._refuse_split(prefix, filled[0], [*filled[1:], *others])

    def _refuse_split(self, prefix: str, folder: Folder, beside: list[Folder]) -> NoReturn:
        names = list_names(other.name for other in beside)
        raise UserError(
            f"{self._name(prefix)} has {folder.name}, a split's name, beside {names}: give the "
            "folder of one split, or name the splits train and validation and keep nothing beside them"
        )

    # ---- classes

    def _find_inner(self, tree: Folder, prefix: str) -> tuple[Folder, str]:
        """The only folder on the way down that has several classes, splits or a table; the tree itself without one."""
        inner, below = tree, prefix
        while True:
            filled = [folder for folder in inner.folders.values() if folder.count]
            has_empty = any(_is_empty(folder) for folder in inner.folders.values() if not folder.count)
            if inner.images or len(filled) != 1 or has_empty:
                return tree, prefix
            inner, below = filled[0], f"{below}{filled[0].name}/"
            has_table = self.path is not None and any(name.lower() in TABLES for name in inner.others)
            classes = [folder for folder in inner.folders.values() if folder.count]
            has_split = any(folder.name.lower() in (*TRAIN, *HELD_OUT) for folder in classes)
            if has_table or (not inner.images and (len(classes) > 1 or has_split)):
                return inner, below

    def _read_part(self, tree: Folder, prefix: str) -> _Part:
        """The images of a folder with their classes: of its table, of its sub-folders, or the set's one class."""
        self.prefixes.append(prefix)
        metadata = self._read_table(tree, prefix)
        if metadata:
            rows = self._list_rows(metadata.rows)
            return _Part(prefix, rows, {label for _, label in rows})
        inner, below = self._find_inner(tree, prefix)
        if inner is not tree:
            return self._read_part(inner, below)
        for option in ("label_column", "image_column", *(("caption_column",) if self.captioned else ())):
            if asked := getattr(self.config, option):
                raise MissingColumnError(option, f"{self._name(prefix)} has no table with a column '{asked}'")
        filled = [folder for folder in tree.folders.values() if folder.count]
        if not filled and not tree.images:
            place = self._name(prefix).rstrip("/")
            raise UserError(
                f"{place} has no images; expected {place}/CLASS/IMAGE.png and the like, or images without classes"
            )
        if filled and tree.images:
            raise UserError(
                f"{self._name(prefix)} has both class sub-folders ({filled[0].name}, ...) and {len(tree.images)} "
                f"images outside them ({tree.images[0]}): move these into a class, or away"
            )
        if not filled:
            return _Part(prefix, [(f"{prefix}{name}", self.set_name) for name in tree.images], {self.set_name})
        empty = [folder for folder in tree.folders.values() if not folder.count]
        if empty and not self.config.allow_empty_classes:
            self._refuse_empty(empty, prefix)
        rows = [(path, f.name) for f in filled for path in f.list_images(f"{prefix}{f.name}/")]
        nested = [f"{f.name}/{sub.name}" for f in filled for sub in f.folders.values() if sub.count]
        if nested:
            self.unused.remark(
                f"{self._name(prefix)}: images in folders of classes ({list_names(nested)}) count as of that class"
            )
        return _Part(prefix, rows, {folder.name for folder in (*filled, *empty)})

    def _refuse_empty(self, empty: list[Folder], prefix: str) -> None:
        others = [f"{folder.name}/{name}" for folder in empty for name in folder.others]
        held = f" ({len(others)} other files, such as {others[0]})" if others else ""
        names = list_names([folder.name for folder in empty])
        raise UserError(
            f"{self._name(prefix)} has folders without images: {names}{held}; add images or remove the folders, or "
            "give --images.allow-empty-classes to keep them as classes without images"
        )

    # ---- the result

    def _arrange_parts(self, train: _Part, held_out: _Part | None) -> Layout:
        """All rows in order. UserError when the held-out part has classes that the training part does not have."""
        unknown = sorted(held_out.class_names - train.class_names) if held_out else []
        if held_out and unknown and not self.config.allow_empty_classes:
            raise UserError(
                f"{self._name(held_out.prefix).rstrip('/')} has classes that {self._name(train.prefix).rstrip('/')} "
                f"does not have: {list_names(unknown)}"
            )
        rows = [*train.rows, *(held_out.rows if held_out else [])]
        names = tuple(sorted(train.class_names | (held_out.class_names if held_out else set())))
        number = {name: i for i, name in enumerate(names)}
        count = len(train.rows)
        splits = {"train": list(range(count)), "held_out": list(range(count, len(rows)))} if held_out else {}
        return Layout([path for path, _ in rows], [number[name] for _, name in rows], names, splits, self.tables)

    def read_captions(self, tree: Folder, layout: Layout, read_lines: ReadLines) -> Captions:
        """The captions of the layout's images: of their table, else of the .txt files beside them."""
        beside: dict[str, str] = {}
        for prefix, folder in tree.walk():
            for name in folder.others:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() == CAPTION_SUFFIX:
                    beside.setdefault(f"{prefix}{stem}", f"{prefix}{name}")
        rows = []
        for file in layout.files:
            texts, text_file = self.listed_captions.get(file), beside.get(os.path.splitext(file)[0])
            if texts is None and text_file is not None:
                self.accounted.add(text_file)
                texts = tuple(read_lines(text_file))
            rows.append((file, texts))
        if all(texts is None for _, texts in rows):
            first = layout.files[0]
            raise UserError(
                f"{self.where} has no captions: expected a metadata.jsonl or metadata.csv with the columns file_name "
                f"and caption, or a text file beside each image, such as {os.path.splitext(first)[0]}.txt for {first}"
            )
        return collect_captions([(file, texts or ()) for file, texts in rows], self.where, self.unused)

    def note_unused(self, tree: Folder, layout: Layout) -> None:
        """Add files of the tree that the layout does not have to `unused`."""
        reason = f"images that {layout.tables[0].name} does not list" if layout.tables else "images outside the splits"
        files = {*layout.files, *self.accounted}
        tables = {str(table) for table in layout.tables}
        for prefix, folder in tree.walk():
            part = self._name_part(prefix)
            for name in folder.system:
                self.unused.add("hidden or system files and folders", part, f"{prefix}{name}")
            for name in folder.others:
                is_table = self.path is not None and str(self.path / f"{prefix}{name}") in tables
                if not is_table and f"{prefix}{name}" not in self.accounted:
                    self.unused.add("files that are no images", part, f"{prefix}{name}")
            for name in folder.images:
                if f"{prefix}{name}" not in files:
                    self.unused.add(reason, part, f"{prefix}{name}")

    def _name_part(self, prefix: str) -> str:
        """The class, or another first folder, that a path is in."""
        root = max((p for p in self.prefixes if prefix.startswith(p)), key=len, default="")
        return prefix.removeprefix(root).split("/")[0]

    def _name(self, prefix: str) -> str:
        return f"{self.where.rstrip('/')}/{prefix}" if prefix else self.where


def _has_both_splits(tree: Folder) -> bool:
    names = {folder.name.lower() for folder in tree.folders.values() if folder.count}
    return bool(names & set(TRAIN)) and bool(names & set(HELD_OUT))


def _is_empty(folder: Folder) -> bool:
    return not any(sub.images or sub.others for _, sub in folder.walk())
