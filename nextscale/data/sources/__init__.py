"""Where images and labels are stored: a folder, parquet files, tar archives, or scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name
from nextscale.common.sizes import Size, expand_size
from nextscale.config.data import ReadConfig
from nextscale.data.sources.digits import Digits
from nextscale.data.sources.folder import open_folder, open_unlabelled
from nextscale.data.sources.parquet import Parquet, has_images, list_hub_files
from nextscale.data.sources.source import MissingColumnError, Source, Unused, check_classes
from nextscale.data.sources.tar import Tar
from nextscale.data.sources.tree import Folder, scan_folder


def open_source(
    data: str, size: Size, config: ReadConfig | None = None, *, labelled: bool = True, captioned: bool = False
) -> Source:
    """The images of `data`: "digits" (enlarged to cover `size`), a folder, a .parquet or .tar file, or owner/name on
    the hub. docs/data.md has the layouts of folders.

    `labelled`: False: the source gives all images as one class, whatever labels they have or lack, and no split.
    `captioned`: the source has captions; where it has no labels all images are one class, with the split that it has.
    Raises UserError when it is none of these, when it can be understood in several ways, when it holds no images, when
    a column is missing, or when a class has no images and `config` does not allow that.
    """
    config = config or ReadConfig()
    source = _open(data, size, config, labelled, captioned)
    if labelled and not config.allow_empty_classes:
        check_classes(source)
    return source


def open_optional(
    data: str, size: Size, config: ReadConfig | None = None
) -> tuple[Source, dict[str, MissingColumnError]]:
    """`open_source` for a use that needs no labels, and that has several data sets with one `config`.

    Columns that `config` names and the data set lacks are as not asked for; they are returned, with the error, by the
    field of `config`. Without labels all images are one class. Either is remarked in the source's `unused`. Raises
    UserError in all other cases of `open_source`.
    """
    lacking: dict[str, MissingColumnError] = {}
    remarks: list[str] = []
    labelled = True
    while True:
        without: dict[str, Any] = dict.fromkeys(lacking, "")
        try:
            source = open_source(data, size, replace(config or ReadConfig(), **without), labelled=labelled)
            break
        except MissingColumnError as error:
            if error.option:
                lacking[error.option] = error
                remarks.append(f"{error}; it is read as without --images.{error.option.replace('_', '-')}")
            elif labelled:
                labelled = False
                remarks.append(f"{error}; all its images are one class")
            else:
                raise
    for remark in remarks:
        source.unused.remark(remark)
    return source, lacking


def _open(data: str, size: Size, config: ReadConfig, labelled: bool, captioned: bool) -> Source:
    path = Path(data)
    if data == "digits":
        if captioned:
            raise UserError("digits have no captions: name a data set that has them")
        for option in ("label_column", "image_column"):
            if getattr(config, option):
                raise MissingColumnError(
                    option, f"digits have no columns: leave out --images.{option.replace('_', '-')}"
                )
        return Digits(max(expand_size(size)))
    if path.is_dir():
        return _open_folder(path, data, config, labelled, captioned)
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(data, [data], data, config=config, labelled=labelled, captioned=captioned)
    if path.suffix == ".tar" and path.is_file():
        return Tar(data, [data], data, config, labelled, captioned)
    if path.is_file() and (path.suffix == ".tgz" or ".tar" in path.suffixes):
        raise UserError(f"{data} is compressed, so its images cannot be read one by one: unpack it")
    if is_hub_name(data) and not path.suffix:
        files, root = list_hub_files(data), f"datasets/{data}"
        return Parquet(data, files, root, on_hub=True, config=config, labelled=labelled, captioned=captioned)
    raise UserError(
        f"{data} is neither 'digits', a folder of images, of class sub-folders or of .parquet or .tar files, "
        "a .parquet or .tar file, nor owner/name on the Hugging Face hub"
    )


def _open_folder(path: Path, data: str, config: ReadConfig, labelled: bool, captioned: bool) -> Source:
    """Images of a folder, or of the tables or archives in it."""
    tree = scan_folder(path)
    tables, archives = (_find_files(path, tree, suffix) for suffix in (".parquet", ".tar"))
    folders = [folder.name for folder in tree.folders.values() if folder.count]
    if folders and any(has_images(table) for table in tables):
        raise UserError(
            f"{data} has both tables of images ({tables[0]}) and folders with images ({folders[0]}): name the one to "
            "read"
        )
    asked = config.label_column or config.image_column
    if tree.count and not (labelled or asked or tables or archives):
        return open_unlabelled(path, tree)
    if folders or not (tables or archives):
        return open_folder(path, config, tree, captioned)
    if tables and archives:
        raise UserError(f"{data} has both tables ({tables[0]}) and archives ({archives[0]}): name the one to read")
    source = (
        Parquet(data, tables, data, config=config, labelled=labelled, captioned=captioned)
        if tables
        else Tar(data, archives, data, config, labelled, captioned)
    )
    _note_unused(source.unused, path, tree, {*tables, *archives, *map(str, getattr(source, "tables", ()))})
    return source


def _find_files(path: Path, tree: Folder, suffix: str) -> list[str]:
    """Files with a suffix in a folder and its sub-folders, else deeper ones, in the order of their paths."""
    found = [Path(prefix, name) for prefix, folder in tree.walk() for name in folder.others if name.endswith(suffix)]
    near = [file for file in found if len(file.parts) <= 2]
    return [str(path / file) for file in sorted(near or found)]


def _note_unused(unused: Unused, path: Path, tree: Folder, used: set[str]) -> None:
    """Add files beside tables or archives to `unused`."""
    for prefix, folder in tree.walk():
        for name in [*folder.images, *folder.others]:
            if str(path / prefix / name) not in used:
                unused.add("files beside the tables or archives", prefix.rstrip("/"), f"{prefix}{name}")
        for name in folder.system:
            unused.add("hidden or system files and folders", prefix.rstrip("/"), f"{prefix}{name}")
