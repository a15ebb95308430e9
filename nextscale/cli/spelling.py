"""Options as the user typed them: in messages, and empty ones refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nextscale.common.dtypes import SHORT_NAMES
from nextscale.common.errors import SettingError, UserError

_TYPE_OPTIONS = ("dtype", "dtypes", "precision")


def name_as_typed(error: SettingError, arguments: list[str]) -> str:
    """The message of a setting's rule, with the setting as its option stands in the arguments.

    The message stays as it is when the value is from a file. Of several options of one name, as --train-tokenizer.steps
    and --train-encoder.steps, the one with the value at fault is named.
    """
    shown = _show_value(error.value)
    typed = [(word, value) for word, value in _pair_options(arguments) if _get_field(word) == error.name]
    if not typed:
        return str(error)
    option = next((word for word, value in typed if _is_equal(value, shown)), typed[-1][0])
    prefix = option[: len(option) - len(error.name)]

    def spell(match: re.Match[str]) -> str:
        name = match[0]
        if name == error.name:
            return option
        return prefix + name.replace("_", "-") if name in error.names and "_" in name else name

    rule = re.sub(r"\b[a-z]\w*\b", spell, error.rule)
    return f"{rule}; got {shown}"


def spell_out_types(arguments: list[str]) -> list[str]:
    """The arguments with the names of types spelled out: --train.precision bf16 means bfloat16."""
    spelled, is_type = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            is_type = _get_field(option) in _TYPE_OPTIONS
            short = SHORT_NAMES.get(value) if is_type and equals else None
            spelled.append(f"{option}={short}" if short else argument)
        else:
            spelled.append(SHORT_NAMES.get(argument, argument) if is_type else argument)
    return spelled


def restore_spelling(text: str, arguments: list[str]) -> str:
    """A printed text that names options in one spelling (--batch-size) with the one that was typed (--batch_size)."""
    for word, _ in _pair_options(arguments):
        text = re.sub(re.escape(word.replace("_", "-")) + r"(?![\w.-])", word, text)
    return text


def refuse_empty_paths(kind: type, arguments: list[str]) -> None:
    """Raise UserError for an option of a command that takes a path, or must be given, and is empty: --out ""."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for word, value in _pair_options(arguments):
        name = _get_field(word)
        if "." in word or name not in fields or value is None or value.strip():
            continue
        required = fields[name].default is fields[name].default_factory  # both are "missing"
        if required or Path in (hints[name], *get_args(hints[name])):
            raise UserError(f"{word} is empty; give it a value, or leave it out")
    if arguments and not arguments[0].strip() and _has_positional(kind):
        raise UserError(f"the first argument, {next(iter(fields)).upper()}, is empty")


def refuse_repeated_lists(kind: type, arguments: list[str]) -> None:
    """Raise UserError for an option of a command that takes several values and is given twice: the parser would keep
    those of the last one alone."""
    hints = get_type_hints(kind)
    words = [word for word, _ in _pair_options(arguments) if "." not in word]
    for word in dict.fromkeys(words):
        if words.count(word) > 1 and get_origin(hints.get(_get_field(word))) is tuple:
            raise UserError(f"{word} is given {words.count(word)} times: give it once, with all values behind it")


def _has_positional(kind: type) -> bool:
    first = next(iter(dataclasses.fields(kind)), None)
    return first is not None and "Positional" in str(first.type)


def _pair_options(arguments: list[str]) -> list[tuple[str, str | None]]:
    """(option, its first value) of the arguments."""
    pairs: list[tuple[str, str | None]] = []
    for i, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            option, equals, value = argument.partition("=")
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            pairs.append((option, value if equals else following))
    return pairs


def _get_field(option: str) -> str:
    """The name of the setting that an option sets: batch_size for --train.batch-size."""
    return option.split(".")[-1].lstrip("-").replace("-", "_")


def _show_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _is_equal(text: str | None, shown: str) -> bool:
    """Whether an argument spells this value, as a number or as it is."""
    if text is None:
        return False
    try:
        return text == shown or float(text) == float(shown)
    except ValueError:
        return text == shown.split(" ")[0]
