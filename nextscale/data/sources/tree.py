"""What a folder holds: images, other files and sub-folders, without the files that systems and programs put there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from nextscale.common.errors import UserError

_UNREADABLE_FORMATS = {"PDF", "PALM", "MPEG", "BUFR", "GRIB", "HDF5"}
"""Formats whose suffixes PIL knows but whose pictures it cannot decode."""
SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form not in _UNREADABLE_FORMATS}
"""Suffixes of image files, in lower case."""
_SYSTEM_NAMES = {
    "__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


@dataclass
class Folder:
    """A folder of a tree."""

    name: str
    images: list[str] = field(default_factory=list)
    """Names of the image files directly in it, sorted."""
    others: list[str] = field(default_factory=list)
    """Names of the other files directly in it."""
    system: list[str] = field(default_factory=list)
    """Names of hidden and system files and folders directly in it. They are not looked into."""
    folders: dict[str, Folder] = field(default_factory=dict)
    """Sub-folders by name, sorted."""

    @cached_property
    def count(self) -> int:
        """Number of images in it and below it."""
        return len(self.images) + sum(folder.count for folder in self.folders.values())

    def list_images(self, prefix: str = "") -> Iterator[str]:
        """Paths of all images in it and below it, each part of a path in the order of names."""
        for name in sorted([*self.images, *self.folders]):
            if name in self.folders:
                yield from self.folders[name].list_images(f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}"

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Folder]]:
        """(path with a slash at its end or "", folder) of itself and of all folders below it."""
        yield prefix, self
        for folder in self.folders.values():
            yield from folder.walk(f"{prefix}{folder.name}/")


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or of an operating system or a program: .DS_Store, ._x.jpg, Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def scan_folder(path: Path) -> Folder:
    """The tree below a folder. Links are followed, except to a folder that contains them. UserError if unreadable."""
    return _scan(str(path), path.name, frozenset())


def _scan(path: str, name: str, above: frozenset[str]) -> Folder:
    folder, subfolders = Folder(name), []
    above |= {os.path.realpath(path)}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_system_name(entry.name):
                    folder.system.append(entry.name)
                elif entry.is_dir():
                    if not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                        subfolders.append(entry.name)
                elif is_image_name(entry.name) and entry.is_file():
                    folder.images.append(entry.name)
                else:
                    folder.others.append(entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from error
    folder.images.sort()
    folder.others.sort()
    folder.system.sort()
    folder.folders = {sub: _scan(os.path.join(path, sub), sub, above) for sub in sorted(subfolders)}
    return folder


def build_tree(paths: list[str]) -> Folder:
    """The tree of files with these paths, as an archive lists them."""
    root = Folder("")
    for path in sorted(paths):
        *parts, name = path.split("/")
        folder = root
        for part in parts:
            if is_system_name(part):
                break
            folder = folder.folders.setdefault(part, Folder(part))
        else:
            kind = "system" if is_system_name(name) else "images" if is_image_name(name) else "others"
            getattr(folder, kind).append(name)
            continue
        folder.system.append(part)
    _sort(root)
    return root


def _sort(folder: Folder) -> None:
    folder.images.sort()
    folder.others.sort()
    folder.system = sorted(set(folder.system))
    folder.folders = dict(sorted(folder.folders.items()))
    for sub in folder.folders.values():
        _sort(sub)
