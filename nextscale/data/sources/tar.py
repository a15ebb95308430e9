"""Tar archives: samples of several files with one name each (WebDataset), or folders of classes.

Opening reads the headers and the labels. Images are read from their place in the archive, in any order.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_files
from nextscale.common.reading import parse_json
from nextscale.config.classes import list_names
from nextscale.config.data import ReadConfig
from nextscale.data.images import ImageLike
from nextscale.data.sources.captions import CAPTION_COLUMNS, Captions, collect_captions, read_cell
from nextscale.data.sources.labels import TableLabels, arrange_tables, parse_split
from nextscale.data.sources.layout import find_layout
from nextscale.data.sources.source import MissingColumnError, Unused, shuffle_rows
from nextscale.data.sources.tree import build_tree, is_image_name, is_system_name

_NAMES_FILE = "classnames.txt"
_LABEL_FIELDS = ("label", "labels", "cls", "class", "category")
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: int
    name: str
    offset: int
    size: int


_Sample = dict[str, Member]
"""The files of a sample by their suffix without its dot: jpg, cls, json."""


class Tar:
    """Images of .tar archives.

    Files with equal names but for what follows the first dot are a sample. Its label is its .cls file or a field of its
    .json file; numbers are named by the lines of classnames.txt beside the archive, where there is one. Without labels
    the archive's folders are read as a folder on disk is. With `labelled` False all images are one class. With
    `captioned` captions are read from .txt files or from a field of .json files, and labels may be missing.
    """

    captions: Captions | None = None

    def __init__(
        self, where: str, files: Sequence[str], root: str, config: ReadConfig | None = None, labelled: bool = True,
        captioned: bool = False,
    ):  # fmt: skip
        self.where, self.files, self.config, self.unused = where, list(files), config or ReadConfig(), Unused()
        self.tables: list[Path] = []
        archives = [_list_members(number, file, self.unused) for number, file in enumerate(self.files)]
        samples = [_group_samples(members) for members in archives]
        self._check_image_suffix(samples)
        label = self._find_label(samples)
        caption = self._find_caption(samples, label) if captioned else ""
        if not labelled:
            self._read_all(archives, samples if label or self.config.image_column else [])
        elif label or caption:
            self._read_samples(samples, label, caption, root)
        elif self.config.image_column:
            raise MissingColumnError("", f"{where} has no samples with labels: leave out --images.image-column")
        else:
            self._read_folders(archives, root, captioned)

    # ---- WebDataset

    def _check_image_suffix(self, samples: list[dict[str, _Sample]]) -> None:
        asked = self.config.image_column.lower()
        suffixes = {suffix for archive in samples for sample in archive.values() for suffix in sample}
        if asked and asked not in suffixes:
            known = list_names(sorted(suffixes))
            raise MissingColumnError("image_column", f"{self.where} has no images '{asked}'; its samples have {known}")

    def _find_label(self, samples: list[dict[str, _Sample]]) -> str:
        """The suffix or the field of a .json file that holds the labels; "" where there are none."""
        suffixes = {suffix for archive in samples for sample in archive.values() for suffix in sample}
        fields: dict[str, None] = {}
        asked = self.config.label_column
        if "json" in suffixes and (asked or "cls" not in suffixes):
            for archive in samples:
                for sample in archive.values():
                    fields.update(dict.fromkeys(self._read_json(sample)))
        if asked:
            if asked not in suffixes and asked not in fields:
                known = list_names([*sorted(suffixes), *fields])
                raise MissingColumnError(
                    "label_column", f"{self.where} has no labels '{asked}'; its samples have {known}"
                )
            return asked
        return "cls" if "cls" in suffixes else next((name for name in _LABEL_FIELDS if name in fields), "")

    def _find_caption(self, samples: list[dict[str, _Sample]], label: str) -> str:
        """The suffix or the field of a .json file that holds the captions; "" for .txt files of samples without labels,
        which are read as those of a folder on disk."""
        everything = [sample for archive in samples for sample in archive.values()]
        suffixes = {suffix for sample in everything for suffix in sample}
        asked = self.config.caption_column
        if (asked or "txt") in suffixes:
            return asked or ("txt" if label else "")
        fields = dict.fromkeys(name for sample in everything for name in self._read_json(sample))
        found = next((name for name in ((asked,) if asked else CAPTION_COLUMNS) if name in fields), None)
        if found is None:
            known = list_names([*sorted(suffixes), *fields])
            message = f"{self.where} has no captions '{asked or 'txt'}'; its samples have {known}"
            raise MissingColumnError("caption_column", message) if asked else UserError(message)
        return found

    def _read_caption(self, sample: _Sample, caption: str) -> tuple[str, ...]:
        if caption in sample:
            return tuple(self._read_text(sample[caption]).splitlines())
        return read_cell(self._read_json(sample).get(caption), f"{self.where}: the field '{caption}'")

    def _read_samples(self, samples: list[dict[str, _Sample]], label: str, caption: str, root: str) -> None:
        """`label` "": all samples are one class. `caption` "": captions are not asked for."""
        tables: list[TableLabels] = []
        captions: list[tuple[str, tuple[str, ...]]] = []
        everything: list[Member] = []
        for number, archive in enumerate(samples):
            split = parse_split(self.files[number].removeprefix(root))
            names = self._read_class_names(Path(self.files[number]))
            values: list[Any] = []
            for key, sample in archive.items():
                image = self._choose_image(key, sample)
                if image is None:
                    self.unused.add("samples without an image", split, key)
                    continue
                everything.append(image)
                values.append(self._read_label(sample, label) if label else Path(self.where).stem)
                captions += [(key, self._read_caption(sample, caption))] if caption else []
            tables.append(TableLabels(self.files[number], split, values, names if label else (), label))
        arranged = arrange_tables(tables, self.where, self.unused)
        self.class_names, self.labels, self.splits = arranged.class_names, arranged.labels, arranged.splits
        self._members = [everything[row] for row in arranged.rows]
        if caption:
            self.captions = collect_captions([captions[row] for row in arranged.rows], self.where, self.unused)

    def _choose_image(self, key: str, sample: _Sample) -> Member | None:
        asked = self.config.image_column.lower()
        images = [suffix for suffix in sample if (suffix == asked if asked else is_image_name(f"x.{suffix}"))]
        if len(images) > 1:
            raise UserError(
                f"{self.where}: the sample {key} has several images ({', '.join(images)}); choose one with "
                "--images.image-column"
            )
        return sample[images[0]] if images else None

    def _read_label(self, sample: _Sample, label: str) -> Any:
        """A number or a text; None where the sample has none."""
        if label not in sample:
            return self._read_json(sample).get(label)
        text = self._read_text(sample[label])
        return int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else text

    def _read_json(self, sample: _Sample) -> dict[str, Any]:
        if "json" not in sample:
            return {}
        member = sample["json"]
        fields = parse_json(self._read_text(member), f"{member.name} of {self.files[member.archive]}")
        return fields if isinstance(fields, dict) else {}

    def _read_text(self, member: Member) -> str:
        try:
            return self._read_member(member).decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.files[member.archive]}: {member.name} is no text: {error}") from error

    def _read_class_names(self, archive: Path) -> tuple[str, ...]:
        """The lines of classnames.txt beside an archive or in the data set's folder; () without one."""
        for folder in dict.fromkeys([archive.parent, Path(self.where)]):
            path = folder / _NAMES_FILE
            if path.is_file():
                if path not in self.tables:
                    self.tables.append(path)
                lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                return tuple(line.strip() for line in lines if line.strip())
        return ()

    # ---- folders in archives

    def _read_folders(self, archives: list[list[Member]], root: str, captioned: bool) -> None:
        """Read members as files of folders; archives that are named by splits are its folders."""
        splits = [parse_split(file.removeprefix(root)) for file in self.files]
        members: dict[str, Member] = {}
        for split, archive in zip(splits, archives, strict=True):
            for member in archive:
                path = f"{split}/{member.name}" if all(splits) else member.name
                if path in members:
                    raise UserError(f"{self.where} has {member.name} in two archives")
                members[path] = member
        inner = [name for name in members if re.search(r"\.(tar|zip|tgz|tar\.\w+)$", name)]
        tree = build_tree(list(members))
        if inner and not tree.count:
            raise UserError(f"{self.where} holds archives ({list_names(inner)}), no images: unpack it")
        read_lines = (lambda path: self._read_text(members[path]).splitlines()) if captioned else None
        name = Path(self.where).resolve().stem
        layout = find_layout(tree, self.where, name, self.config, self.unused, read_lines=read_lines)
        self.captions = layout.captions
        self.class_names, self.labels, self.splits = layout.class_names, layout.labels, layout.splits
        self._members = [members[path] for path in layout.files]

    # ---- without labels

    def _read_all(self, archives: list[list[Member]], samples: list[dict[str, _Sample]]) -> None:
        """All images as one class: those of samples, else all of the archives' folders."""
        found = [self._choose_image(key, sample) for archive in samples for key, sample in archive.items()]
        if not samples:
            found = [_choose_shown(member) for archive in archives for member in archive]
        self._members = [member for member in found if member is not None]
        self.class_names, self.labels, self.splits = (Path(self.where).stem,), [0] * len(self._members), {}
        if not self._members:
            raise UserError(f"{self.where} has no images")

    # ---- as a source

    def read(self, i: int) -> tuple[str, ImageLike | None]:
        member = self._members[i]
        return f"{self.files[member.archive]}: {member.name}", self._read_member(member)

    def _read_member(self, member: Member) -> bytes:
        file = self.files[member.archive]
        try:
            with open(file, "rb") as stream:
                stream.seek(member.offset)
                content = stream.read(member.size)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        if len(content) < member.size:
            raise UserError(f"{file} is truncated: {member.name} is incomplete")
        return content

    def fingerprint(self) -> dict[str, Any]:
        asked = {"image_column": self.config.image_column} if self.config.image_column else {}
        files = [*map(Path, self.files), *self.tables]
        return {"kind": "tar", **fingerprint_files(files, Path(self.where)), **asked}

    def order(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return shuffle_rows(rows, rng)


def _list_members(number: int, file: str, unused: Unused) -> list[Member]:
    """The regular files of an archive in their order, the last one of each name."""
    members: dict[str, Member] = {}
    try:
        size = os.path.getsize(file)
        with tarfile.open(file, "r:") as archive:
            for entry in archive:
                name = entry.name.removeprefix("./")
                if entry.isreg() and not entry.issparse():
                    members[name] = Member(number, name, entry.offset_data, entry.size)
                elif not entry.isdir():
                    unused.add("members of archives that are no regular files", "", name)
            last = max((member.offset + member.size for member in members.values()), default=0)
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(_BLOCK)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file} is damaged or no .tar archive: {str(error).splitlines()[0]}") from error
    if end.strip(b"\0") or last > size:
        raise UserError(f"{file} is damaged or truncated after {list(members)[-1] if members else 'its start'}")
    if not end:
        unused.remark(f"{file} has no end mark: it may be truncated")
    return list(members.values())


def _choose_shown(member: Member) -> Member | None:
    """The member, where it is an image that is neither hidden nor of a system."""
    hidden = any(is_system_name(part) for part in member.name.split("/"))
    return member if is_image_name(member.name) and not hidden else None


def _group_samples(members: list[Member]) -> dict[str, _Sample]:
    """Samples by key, the path up to the first dot of the file's name."""
    samples: dict[str, _Sample] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not any(is_system_name(part) for part in member.name.split("/")):
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix.lower()] = member
    return samples
