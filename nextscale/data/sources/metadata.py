"""metadata.csv and metadata.jsonl: files and labels of a folder, as Hugging Face and spreadsheets write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json
from nextscale.config.data import ReadConfig
from nextscale.data.sources.captions import CAPTION_COLUMNS, read_cell
from nextscale.data.sources.labels import is_marked_text
from nextscale.data.sources.source import HELD_OUT, TRAIN, MissingColumnError, Unused

TABLES = ("metadata.csv", "metadata.jsonl")
_FILE_COLUMNS, _LABEL_COLUMNS = ("file_name", "filename"), ("label", "labels", "class", "category")
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class ListedFile:
    """A row of a table: an image file, its label, its split ("" = none) and its captions."""

    file: Path
    label: str | None
    split: str = ""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metadata:
    """The rows of a table."""

    path: Path
    columns: tuple[str, ...]
    label_column: str
    """"" where no column holds labels; then no row has a label."""
    rows: list[ListedFile]
    left_out: list[Path]
    """Files of rows without a label."""
    caption_column: str = ""
    """"" where no column holds captions, or they were not asked for."""


def read_metadata(path: Path, config: ReadConfig, unused: Unused, captioned: bool = False) -> Metadata:
    """Read a metadata file. Rows without a label, and rows that repeat another, are added to `unused`.

    `captioned`: read captions, too. Rows of one file that differ in nothing else give it several captions.

    Names of columns count in any case, without spaces around them. In a .csv the delimiter may be a comma, a semicolon,
    a tab or a bar; blank rows are skipped. Raises UserError naming the line when the file cannot be understood, lists
    files that do not exist, or lists a file with two labels.
    """
    table = list(_read_csv(path) if path.suffix.lower() == ".csv" else _read_json_lines(path))
    columns = tuple(dict.fromkeys(name for _, row in table for name in row))
    file_column = _choose_column(path, columns, config, "image_column", _FILE_COLUMNS)
    label_column = _choose_column(path, columns, config, "label_column", _LABEL_COLUMNS)
    caption_column = _choose_column(path, columns, config, "caption_column", CAPTION_COLUMNS) if captioned else ""
    if not file_column or not table:
        raise UserError(
            f"{path} must list file_name and label in every row; it has "
            f"{'the columns ' + ', '.join(columns) if columns else 'no rows below a header'}"
        )
    kinds = {isinstance(row.get(label_column), str) for _, row in table if row.get(label_column) is not None}
    if len(kinds) > 1:
        raise UserError(f"{path}: {label_column} is a text in some rows and a number in others; make them alike")
    rows = [_read_row(path, line, row, file_column, label_column, caption_column) for line, row in table]
    absent = [str(row.file) for row in rows if not row.file.is_file()]
    if absent:
        raise UserError(f"{path} lists {len(absent)} files that do not exist, such as {absent[0]}")
    labelled = _drop_unlabelled(path, label_column, rows, unused) if label_column else rows
    used = {row.file for row in labelled}
    left_out = [row.file for row in rows if row.file not in used]
    distinct = _drop_repeated(path, _assign_splits(path, labelled), unused)
    return Metadata(path, columns, label_column, distinct, left_out, caption_column)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, values by column) of each row that is not blank."""
    lines = io.StringIO(_read_text(path), newline="")
    first = lines.readline()
    named = re.fullmatch(r"\s*sep=(.)\s*", first)  # Excel's own line
    header = lines.readline() if named else first
    delimiter = named[1] if named else _find_delimiter(header)
    names = _split_header(header, delimiter)
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise UserError(f"{path} has the column '{repeated[0]}' twice")
    skipped = 2 if named else 1
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for values in reader:
            line = reader.line_num + skipped
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if any(values[len(names) :]):
                raise UserError(
                    f"{path}, line {line} has {len(values)} values for {len(names)} columns: put texts that contain "
                    f"'{delimiter}' in quotes"
                )
            yield line, dict(zip(names, [*values, *[""] * (len(names) - len(values))], strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + skipped} is not CSV: {error}") from error


def _find_delimiter(header: str) -> str:
    """The delimiter that gives the header a column of file names, else the most frequent one."""
    for delimiter in _DELIMITERS:
        if set(_split_header(header, delimiter)) & set(_FILE_COLUMNS):
            return delimiter
    return max(_DELIMITERS, key=header.count)


def _split_header(header: str, delimiter: str) -> list[str]:
    names = next(csv.reader([header.strip("\r\n")], delimiter=delimiter, skipinitialspace=True), [])
    return [_normalize_name(name) for name in names]


def _normalize_name(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, values by column) of each line that is not blank."""
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        row = parse_json(text, f"{path}, line {line}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line} is {text.strip()[:40]}; every line must be a table: {{...}}")
        yield line, {_normalize_name(name): value for name, value in row.items()}


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, with line ends as \\n."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; save it in UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} is damaged: it contains a zero byte")
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _choose_column(
    path: Path, columns: tuple[str, ...], config: ReadConfig, option: str, known: tuple[str, ...]
) -> str:
    """The column asked for by this field of the config, else the first known one, else ""."""
    asked: str = getattr(config, option)
    if asked and _normalize_name(asked) not in columns:
        raise MissingColumnError(option, f"{path} has no column '{asked}'; it has {', '.join(columns)}")
    found = [name for name in known if name in columns]
    if not asked and len(found) > 1 and found[0] in ("class", "category"):
        raise UserError(f"{path} has the columns {' and '.join(found)}: choose one with --images.label-column")
    return _normalize_name(asked) if asked else found[0] if found else ""


def _read_row(
    path: Path, line: int, row: dict[str, Any], file_column: str, label_column: str, caption_column: str
) -> ListedFile:
    name, split = row.get(file_column), row.get("split", "")
    label = row.get(label_column) if label_column else None  # a column may have the name ""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path} must list file_name and label in every row; line {line} has no {file_column}")
    if isinstance(label, dict | list):
        raise UserError(f"{path}, line {line}: {label_column} is {label!r}; it must be a number or a text")
    text = None if label is None or not str(label).strip() else str(label)
    captions = read_cell(row.get(caption_column), f"{path}, line {line}: {caption_column}") if caption_column else ()
    file = _find_file(path.parent, name.strip())
    return ListedFile(file, text, split.lower() if isinstance(split, str) else "", captions)


def _find_file(folder: Path, name: str) -> Path:
    """The file of a row; a name with backslashes is Windows's unless a file has it."""
    file = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not file.is_file() else file


def _drop_unlabelled(path: Path, column: str, rows: list[ListedFile], unused: Unused) -> list[ListedFile]:
    marked = is_marked_text(row.label for row in rows if row.label is not None)
    labelled = [row for row in rows if row.label is not None and not (marked and row.label == "-1")]
    if not labelled:
        raise MissingColumnError("", f"{path}: no row has a label in the column {column}")
    kept = {id(row) for row in labelled}
    for row in rows:
        if id(row) not in kept:
            unused.add(f"images without a label in {path.name}", "", str(row.file))
    return labelled


def _assign_splits(path: Path, rows: list[ListedFile]) -> list[ListedFile]:
    """Rows with their split: of the column split, else the first folder of the file's path, where all rows have one."""
    known = {*TRAIN, *HELD_OUT}
    if all(row.split in known for row in rows):
        return rows
    folders = [_first_folder(row.file, path.parent) for row in rows]
    return [replace(row, split=name if set(folders) <= known else "") for row, name in zip(rows, folders, strict=True)]


def _first_folder(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts if file.is_relative_to(folder) else ()
    return parts[0].lower() if len(parts) > 1 else ""


def _drop_repeated(path: Path, rows: list[ListedFile], unused: Unused) -> list[ListedFile]:
    seen: dict[Path, ListedFile] = {}
    for row in rows:
        first = seen.setdefault(row.file, row)
        if (first.label, first.split) != (row.label, row.split):
            differing = (
                ("label", first.label, row.label) if first.label != row.label else ("split", first.split, row.split)
            )
            raise UserError(
                f"{path} lists {row.file} twice, with the {differing[0]}s {differing[1]} and {differing[2]}"
            )
        if first is not row and row.captions not in ((), first.captions):
            seen[row.file] = replace(first, captions=(*first.captions, *row.captions))
        elif first is not row:
            unused.add(f"rows of {path.name} that repeat another", "", str(row.file))
    return list(seen.values())
