"""What a command reads and writes, checked before it starts: nothing that is there is lost.

Every command declares its inputs and outputs, and `check_outputs` refuses

- an output that is an input or another output of the same command, or lies among the images of an input;
- a file or a folder whose content is of another kind than what would be written;
- content of the same kind that the same command cannot be assumed to have written, unless `--overwrite` is given;
- what cannot be written at all: devices, pipes, folders below a file, folders without permission.

A command that is run again replaces its own results, and training, caches and features are resumed.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from nextscale.common import contents
from nextscale.common.errors import UserError
from nextscale.common.extras import list_data_needs, list_network_needs
from nextscale.common.files import check_writable, find_target
from nextscale.common.reading import read_json

_RESERVED = frozenset(
    (
        "config.json", "model.safetensors", "tokenizer.safetensors", "transformer.safetensors", "original.safetensors",
        "run.json", "finished.json", "quickstart.json", "sparsify.json", "cache.json", "features.json", "log.jsonl",
        "metrics.json", "tune.json",
    )
)  # fmt: skip
"""Names that have a meaning in the folders of models and runs."""
_CLOSED = (contents.TOKEN_CACHE, contents.FEATURES)
"""Folders in which nothing else belongs."""


@dataclass(frozen=True)
class Input:
    """Something that a command reads. Names that are no paths here (digits, hub names) are passed over."""

    option: str
    """As in the help: --data, MODEL."""
    path: Path
    holds: Literal["images", "model", "network", "file"] = "file"
    """images: a data set, among whose files nothing may be written; network: a feature network or an encoder."""

    def list_needs(self) -> dict[str, str]:
        """The optional packages that reading it needs, {package: purpose}."""
        if self.holds == "images":
            return list_data_needs(self.path)
        return list_network_needs(self.path) if self.holds == "network" else {}

    def check(self, output: Output) -> None:
        """Raise UserError when the output would replace or join this input."""
        for path in output.list_files():
            target = find_target(path)
            if _is_same(target, self.path):
                raise UserError(
                    f"{output.option} {path} is also the input {self.option}; choose another {output.option}"
                )
            if self.holds == "images" and _is_inside(target, self.path) and contents.may_be_data(self.path):
                raise UserError(
                    f"{output.option} {path} lies in {self.path}, the data of {self.option}, and would become a part "
                    f"of it; choose another {output.option}"
                )


@dataclass(frozen=True)
class Output(ABC):
    """Something that a command writes."""

    option: str
    """As in the help: --out."""
    path: Path

    def list_files(self) -> list[Path]:
        """The paths that are written."""
        return [self.path]

    def check_name(self) -> None:
        """Raise UserError when the path is no name for such an output."""
        if not str(self.path).strip():
            raise UserError(f"{self.option} is empty; give the name of a file or a folder")

    def check(self, overwrite: bool) -> None:
        """Raise UserError when something else is there, or when nothing can be written there."""
        try:
            check_writable(self.path)
            self.check_content(overwrite)
        except OSError as error:
            raise UserError(f"cannot write {self.option} {self.path}: {error.strerror or error}") from error

    @abstractmethod
    def check_content(self, overwrite: bool) -> None:
        """Raise UserError when what is there may not be replaced."""

    def refuse(self, found: str, *, replaceable: bool = False) -> UserError:
        """The error for what was found there."""
        verb = "holds" if self.path.is_dir() else "is"
        advice = "give --overwrite to replace it, or another" if replaceable else "it is not replaced; choose another"
        return UserError(f"{self.option} {self.path} {verb} {found}; {advice} {self.option}")


@dataclass(frozen=True)
class FileOutput(Output):
    """A file."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    def check_content(self, overwrite: bool) -> None:
        target = find_target(self.path)
        if not self.path.name or target.is_dir():
            raise UserError(f"cannot write {self.option} '{self.path}': it is a folder, not a file name")
        if target.parent.is_dir():
            self._check_folder(contents.identify_folder(target.parent), target.parent)
        if target.exists() and target.stat().st_size:
            own, replaceable = self.compare_content(target)
            if not own and not (replaceable and overwrite):
                raise self.refuse(contents.identify_file(target), replaceable=replaceable)

    def check_name(self) -> None:
        super().check_name()
        self.check_suffix(self.path.suffix.lower())

    def check_suffix(self, suffix: str) -> None:
        """Raise UserError for the suffix of another kind of file."""
        if suffix not in self.suffixes and (suffix in _OTHER_SUFFIXES or _is_picture_suffix(suffix)):
            raise UserError(
                f"{self.option} {self.path} has the suffix of another kind of file; use {' or '.join(self.suffixes)}"
            )

    @abstractmethod
    def compare_content(self, path: Path) -> tuple[bool, bool]:
        """Whether a file was written by the same command, and whether it is of the same kind."""

    def _check_folder(self, kind: str, folder: Path) -> None:
        """Raise UserError when a new file would be taken for a part of the folder's content."""
        named = self.path.name in _RESERVED and kind != contents.EMPTY and not kind.startswith("other files")
        if kind in _CLOSED or named:
            raise UserError(
                f"{self.option} {self.path} lies in {folder}, which holds {kind}; choose another {self.option}"
            )


_OTHER_SUFFIXES = frozenset(
    (".safetensors", ".npz", ".npy", ".parquet", ".pth", ".pt", ".json", ".yaml", ".yml", ".py", ".work")
)


@dataclass(frozen=True)
class PictureFile(FileOutput):
    """A picture; the commands that may have written it are recognised by the name that is stored in it."""

    programs: tuple[str, ...] = ("nextscale sample", "nextscale reconstruct", "nextscale edit")
    """Names whose pictures are replaced."""

    def check_suffix(self, suffix: str) -> None:
        from PIL import Image

        name = Image.registered_extensions().get(suffix) if suffix else "PNG"
        if name not in Image.SAVE or not contents.can_write_picture(name):
            raise UserError(f"{self.option} {self.path}: pictures cannot be written as {suffix}; use .png")

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        with path.open("rb") as file:
            picture = contents.is_picture_start(file.read(12))
        return picture and contents.read_picture_program(path) in self.programs, picture


@dataclass(frozen=True)
class JsonFile(FileOutput):
    """A report; its own kind is recognised by its keys, and by the values that name what it is about."""

    keys: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    suffixes = (".json",)

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        try:
            data = read_json(path)
        except UserError:
            return False, False
        kind = isinstance(data, dict) and set(self.keys) <= set(data)
        return kind and all(data.get(name) == value for name, value in self.about.items()), kind


@dataclass(frozen=True)
class TokensFile(FileOutput):
    """A safetensors file of the tensors `tokens` and `images`."""

    suffixes = (".safetensors",)

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        own = contents.read_tensor_names(path) == {"tokens", "images"}
        return own, own


@dataclass(frozen=True)
class StatisticsFile(FileOutput):
    """An .npz of statistics; our own names the network's fingerprint."""

    def check_suffix(self, suffix: str) -> None:
        if suffix != ".npz":
            raise UserError(f"{self.option} {self.path} must end in .npz: `nextscale evaluate` knows statistics by it")

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        names = {name.removesuffix(".npy") for name in contents.list_zip_members(path)}
        return {"mu", "sigma", "network", "fingerprint"} <= names, {"mu", "sigma"} <= names and "arr_0" not in names


@dataclass(frozen=True)
class WeightsFile(FileOutput):
    """Official weights, as a torch file or as safetensors by the suffix. Nothing tells who wrote such a file."""

    suffixes = (".pth", ".pt", ".safetensors")

    def compare_content(self, path: Path) -> tuple[bool, bool]:
        return False, contents.identify_file(path) in (
            "a torch file", "a pickle (a torch file of an old form)", "a safetensors file",
        )  # fmt: skip


@dataclass(frozen=True)
class FolderOutput(Output):
    """A folder."""

    def check_content(self, overwrite: bool) -> None:
        target = find_target(self.path)
        if target.exists() and not target.is_dir():
            raise UserError(f"cannot write {self.option} {self.path}: it is a file, not a folder")
        if target.is_dir():
            self.check_folder(target, contents.identify_folder(target), overwrite)

    @abstractmethod
    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        """Raise UserError when the folder's content may not be replaced."""


@dataclass(frozen=True)
class RunFolder(FolderOutput):
    """The folder of a run, which is resumed when the same command is run again."""

    kinds: tuple[str, ...]

    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        if kind not in (contents.EMPTY, *self.kinds):
            raise self.refuse(kind)


@dataclass(frozen=True)
class CheckpointFolder(FolderOutput):
    """A checkpoint that is written at once. Another one is replaced with --overwrite, unless it is a training run."""

    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        replaceable = kind == contents.CHECKPOINT
        if kind != contents.EMPTY and not (replaceable and overwrite):
            raise self.refuse(kind, replaceable=replaceable)


@dataclass(frozen=True)
class PicturesFolder(FolderOutput):
    """A folder of single pictures. It may hold earlier ones of nextscale and nothing else."""

    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        if kind == contents.EMPTY:
            return
        if not kind.startswith("other files"):
            raise self.refuse(kind)
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_file() or not contents.read_picture_program(path):
                raise self.refuse(f"{path.name}, which nextscale did not write")


@dataclass(frozen=True)
class ReportFolder(FolderOutput):
    """A folder of named files: a JSON file, by whose content the command knows its own results, and figures."""

    report: str
    """Name of the JSON file."""
    keys: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[str, ...] = ()

    def list_files(self) -> list[Path]:
        return [self.path, *(self.path / name for name in (self.report, *self.figures))]

    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        if kind != contents.EMPTY and not kind.startswith("other files"):
            raise self.refuse(kind)
        report = JsonFile(self.option, self.path / self.report, self.keys, self.about)
        report.check_content(overwrite)
        if find_target(report.path).exists():
            return
        for name in self.figures:
            if (folder / name).exists():
                PictureFile(self.option, self.path / name, ("nextscale",)).check_content(overwrite)


@dataclass(frozen=True)
class ExperimentsFolder(FolderOutput):
    """The folder of all experiments: each makes its own folders in it."""

    def check_folder(self, folder: Path, kind: str, overwrite: bool) -> None:
        if kind in (contents.EMPTY, contents.EXPERIMENTS):
            return
        pictures = [p.name for p in folder.iterdir() if _is_picture_suffix(p.suffix.lower())]
        if pictures or not kind.startswith("other files"):
            raise self.refuse(f"pictures ({', '.join(sorted(pictures)[:3])})" if pictures else kind)


def check_outputs(outputs: Iterable[Output], inputs: Iterable[Input], overwrite: bool = False) -> None:
    """Raise UserError for the first output that would destroy something, or that cannot be written.

    Nothing is created or changed. See the head of this module for the rules.
    """
    outputs, inputs = list(outputs), [i for i in inputs if i.path.exists() and str(i.path) != "digits"]
    for output in outputs:
        for given in inputs:
            given.check(output)
    for number, output in enumerate(outputs):
        output.check_name()
        for other in outputs[:number]:
            _check_pair(other, output)
    for output in outputs:
        output.check(overwrite)


def _check_pair(first: Output, second: Output) -> None:
    """Raise UserError when two outputs are the same file, or one is a file where the other needs a folder."""
    a, b = find_target(first.path), find_target(second.path)
    if _is_same(a, b) or str(a).casefold() == str(b).casefold():
        raise UserError(f"{first.option} and {second.option} are the same: {second.path}; give two names")
    for file, inner in ((first, b), (second, a)):
        if isinstance(file, FileOutput) and _is_inside(inner, find_target(file.path)):
            raise UserError(f"{first.option} {first.path} and {second.option} {second.path}: a file is no folder")
    for folder, file in ((first, second), (second, first)):
        both = isinstance(folder, PicturesFolder) and isinstance(file, PictureFile)
        if both and _is_inside(find_target(file.path), find_target(folder.path)):
            raise UserError(
                f"{file.option} {file.path} would join the pictures of {folder.option}; choose another {file.option}"
            )


@contextmanager
def remove_empty_folders(outputs: Iterable[Output]) -> Iterator[None]:
    """When the block fails, remove folders that it made for the outputs and that are empty."""
    made = [folder for output in outputs for folder in _list_missing(find_target(output.path))]
    try:
        yield
    except BaseException:
        for folder in sorted(set(made), key=lambda path: len(path.parts)):
            if folder.is_dir():
                _remove_empty(folder)
        raise


def _list_missing(path: Path) -> list[Path]:
    """The path and the folders above it that do not exist."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders in and including this one."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(inner)


def _is_same(a: Path, b: Path) -> bool:
    """Whether two paths are the same file: after links, in any spelling."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, lies below a folder."""
    target = Path(os.path.realpath(folder))
    return any(_is_same(parent, target) for parent in Path(os.path.realpath(path)).parents)


def _is_picture_suffix(suffix: str) -> bool:
    from PIL import Image

    return suffix in Image.registered_extensions()
