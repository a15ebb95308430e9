"""Which columns of parquet files hold the images and the labels, and the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json
from nextscale.data.sources.captions import CAPTION_COLUMNS
from nextscale.data.sources.source import MissingColumnError

_IMAGE_COLUMNS, _LABEL_COLUMNS, _OTHER_LABEL_COLUMNS = ("image", "img"), ("label", "labels"), ("class", "category")
_SHOWN = 50


@dataclass(frozen=True)
class Schema:
    """The columns of a file."""

    where: str
    types: dict[str, Any]
    """pyarrow's types by name."""
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What Hugging Face's metadata says of a column; {} where it says nothing that can be understood."""

    def list_feature(self, kind: str) -> list[str]:
        """Columns that the metadata declares as this kind, Image or ClassLabel."""
        return [name for name in self.types if self.features.get(name, {}).get("_type") == kind]

    def read_class_names(self, column: str) -> tuple[str, ...]:
        """The names that the column's own ClassLabel has; () without one."""
        names = self.features.get(column, {}).get("names")
        return tuple(map(str, names)) if isinstance(names, list) else ()


def read_schema(where: str, arrow_schema: Any) -> Schema:
    """The columns of a file with pyarrow's schema. Metadata that is damaged or of another form is taken as absent."""
    types = {name: arrow_schema.field(name).type for name in arrow_schema.names}
    try:
        entry: Any = parse_json((arrow_schema.metadata or {}).get(b"huggingface", b"{}"), where)
        for key in ("info", "features"):
            entry = entry.get(key) or {}
        features = {name: value for name, value in entry.items() if isinstance(value, dict)}
    except (UserError, AttributeError):
        features = {}
    return Schema(where, types, features)


def find_image_column(schema: Schema, asked: str) -> str:
    """The column asked for, else image or img, else the only one that can hold images. UserError without one."""
    if asked:
        candidates = [asked] if asked in schema.types else []
    else:
        candidates = [name for name in _IMAGE_COLUMNS if name in schema.types][:1]
        candidates = candidates or schema.list_feature("Image")
        candidates = candidates or [name for name, type_ in schema.types.items() if _holds_bytes(type_)]
    if len(candidates) != 1:
        many = (
            f"several columns with images ({', '.join(candidates)})"
            if candidates
            else f"no column '{asked or 'image'}'"
        )
        message = (
            f"{schema.where} has {many}; it has {_list_columns(list(schema.types))}; choose the images' with "
            "--images.image-column"
        )
        raise MissingColumnError("image_column", message) if asked else UserError(message)
    if not _holds_images(schema.types[candidates[0]]):
        raise UserError(
            f"{schema.where}: column '{candidates[0]}' holds {schema.types[candidates[0]]}, not image files (bytes, or "
            "a path)"
        )
    return candidates[0]


def find_label_columns(schemas: Sequence[Schema], images: Sequence[str], asked: str) -> list[str]:
    """The column of the labels in each file; "" where a file has none, but another one has.

    It is the column asked for, else label or labels, else the only column that is declared as a class label, else class
    or category. UserError lists the columns that could be labels when none or several of them are found, and when the
    column holds neither numbers nor texts.
    """
    known = [(asked,)] if asked else [_LABEL_COLUMNS, _find_declared(schemas), _OTHER_LABEL_COLUMNS]
    for names in known:
        found = [next((name for name in names if name in schema.types), "") for schema in schemas]
        if any(found):
            break
    else:
        _refuse_labels(schemas, images, asked)
    for schema, column in zip(schemas, found, strict=True):
        if column and not _holds_labels(schema.types[column], chosen=True):
            raise UserError(
                f"{schema.where}: column '{column}' must hold a whole number or a text in every row; it holds "
                f"{schema.types[column]}; {_suggest_labels(schemas, images)}"
            )
    return found


def find_caption_columns(schemas: Sequence[Schema], asked: str) -> list[str]:
    """The column of the captions in each file, the one asked for, else caption, captions or text; "" where a file has
    none, but another one has.

    UserError when no file has one, and when it holds neither texts nor lists of texts.
    """
    names = (asked,) if asked else CAPTION_COLUMNS
    found = [next((name for name in names if name in schema.types), "") for schema in schemas]
    if not any(found):
        first = schemas[0]
        message = (
            f"{first.where} has no captions: no column '{asked or CAPTION_COLUMNS[0]}'; it has "
            f"{_list_columns(list(first.types))}; choose the captions' with --images.caption-column"
        )
        raise MissingColumnError("caption_column", message) if asked else UserError(message)
    for schema, column in zip(schemas, found, strict=True):
        if column and not _holds_texts(schema.types[column]):
            raise UserError(
                f"{schema.where}: column '{column}' holds {schema.types[column]}, not captions (a text or a list of "
                "texts in every row); choose another one with --images.caption-column"
            )
    return found


def _find_declared(schemas: Sequence[Schema]) -> tuple[str, ...]:
    """The only column that is declared as a class label, if there is just one."""
    declared = {name for schema in schemas for name in schema.list_feature("ClassLabel")}
    return tuple(declared) if len(declared) == 1 else ()


def _refuse_labels(schemas: Sequence[Schema], images: Sequence[str], asked: str) -> None:
    first = schemas[0]
    raise MissingColumnError(
        "label_column" if asked else "",
        f"{first.where} has no column '{asked or 'label'}'; it has {_list_columns(list(first.types))}; "
        f"{_suggest_labels(schemas, images)}",
    )


def _suggest_labels(schemas: Sequence[Schema], images: Sequence[str]) -> str:
    """A hint that lists the columns that could be labels."""
    usable = dict.fromkeys(
        name
        for schema, image in zip(schemas, images, strict=True)
        for name, type_ in schema.types.items()
        if name != image and _holds_labels(type_)
    )
    if not usable:
        return "none of them holds whole numbers or texts that could be labels"
    return f"choose one that could be labels with --images.label-column: {_list_columns(list(usable))}"


def _list_columns(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _holds_labels(type_: Any, chosen: bool = False) -> bool:
    """Whether a column's type can be labels: numbers, truth values, texts; of a chosen one also floats and nothing."""
    from pyarrow import types

    if types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = types.is_integer, types.is_boolean, types.is_string, types.is_large_string
    return any(kind(type_) for kind in kinds) or (chosen and (types.is_floating(type_) or types.is_null(type_)))


def _holds_texts(type_: Any) -> bool:
    """Whether a column's type can be captions: texts, or lists of texts."""
    from pyarrow import types

    if types.is_list(type_) or types.is_large_list(type_):
        type_ = type_.value_type
    if types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = types.is_string, types.is_large_string, types.is_string_view, types.is_null
    return any(kind(type_) for kind in kinds)


def _holds_bytes(type_: Any) -> bool:
    """Whether a column's type is bytes, or a struct with bytes."""
    from pyarrow import types

    if types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0
    return types.is_binary(type_) or types.is_large_binary(type_)


def _holds_images(type_: Any) -> bool:
    """Whether a column's type can be images: bytes, paths, or a struct with one of them."""
    from pyarrow import types

    is_text = types.is_string(type_) or types.is_large_string(type_) or types.is_null(type_)
    return is_text or _holds_bytes(type_) or (types.is_struct(type_) and type_.get_field_index("path") >= 0)
