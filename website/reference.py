"""Pages of the reference, as Markdown, from the code: every command with its options, and every field of a config.

Nothing here needs MkDocs. `hooks.py` adds the pages to the site, and `tests/test_site.py` compares them with `--help`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import types
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import nextscale.config
from nextscale.cli.commands import COMMANDS

_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", Any: "any"}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command, or a field of a config."""

    name: str
    """As it is typed, such as --images.flip; of a positional word, its name in capitals."""
    kind: str
    """What it takes, in words; empty for a flag."""
    default: str
    """Empty when it must be given."""
    text: str
    table: type | None = None
    """The config that it is a field of; None for the command's own."""
    prefix: str = ""
    """What the options of that config begin with, such as `transformer.experts.`."""


# commands


def list_options(name: str) -> list[Option]:
    """All options of a command, its own and those of its configs, in the order of `--help-all`."""
    return sorted(_walk(COMMANDS[name], None, ""), key=lambda option: option.table is not None)


def _walk(kind: type, defaults: Any, prefix: str, table: type | None = None) -> Iterator[Option]:
    """`defaults`: an instance whose values are the defaults; None: those of the fields."""
    texts, hints = read_field_texts(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, extras = _split_hint(hints[field.name])
        typed = next((e.name for e in extras if getattr(e, "name", None) is not None), field.name.replace("_", "-"))
        default = _find_default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, default, f"{prefix}{typed}." if typed else prefix, hint)
            continue
        if get_origin(hint) is dict and any(map(dataclasses.is_dataclass, get_args(hint))):
            continue  # tables by name, which only a config file can have
        text = texts.get(field.name) or next(e.help for e in extras if getattr(e, "help", None))
        if "Positional" in map(str, extras):
            yield Option(field.name.upper().replace("_", "-"), describe_type(hint), _show(default), text)
        elif hint is bool:
            negated = default is True
            name = f"--{prefix}{'no-' * negated}{typed}"
            yield Option(name, "", "on" if negated else "off", text, table, prefix)
        else:
            yield Option(f"--{prefix}{typed}", describe_type(hint), _show(default), text, table, prefix)


def write_command(name: str, examples: list[str]) -> str:
    """The page of a command. `examples`: command lines of docs/commands.md."""
    kind, options = COMMANDS[name], list_options(name)
    summary, _, more = inspect.cleandoc(kind.__doc__).partition("\n\n")
    words = [option.name for option in options if not option.name.startswith("-")]
    needed = [f"{option.name} ..." for option in options if option.name.startswith("-") and not option.default]
    lines = [f"# nextscale {name}", "", summary, "", *([more, ""] if more else [])]
    lines += ["```sh", " ".join(["nextscale", name, *words, *needed, "[OPTIONS]"]), "```", ""]
    if examples:
        lines += ["## Examples", "", "```sh", *examples, "```", ""]
    lines += ["## Options", ""]
    for table, prefix in dict.fromkeys((option.table, option.prefix) for option in options):
        if table is not None:
            text = inspect.cleandoc(table.__doc__ or "")
            head = f"--{prefix}*" if prefix else table.__name__
            lines += [
                f"### {head}",
                "",
                text,
                "",
                f"Also in files of settings: [{table.__name__}]({_locate(table)}).",
                "",
            ]
        lines += _write_table("option", [o for o in options if (o.table, o.prefix) == (table, prefix)])
    return "\n".join(lines)


def _locate(table: type) -> str:
    """The link from a command's page to a config."""
    return f"../settings/{table.__module__.rpartition('.')[2]}.md#{table.__name__.lower()}"


# configs


def list_configs() -> dict[str, list[type]]:
    """Module of `nextscale.config` -> its public dataclasses of settings, in the order of the file."""
    found = {}
    for info in pkgutil.iter_modules(nextscale.config.__path__):
        module = import_module(f"nextscale.config.{info.name}")
        kinds = [k for k in vars(module).values() if dataclasses.is_dataclass(k) and isinstance(k, type)]
        own = [k for k in kinds if k.__module__ == module.__name__ and k.__name__.endswith("Config")]
        if own:
            found[info.name] = own
    return found


def write_configs(module: str, kinds: list[type]) -> str:
    """The page of the configs of a module of `nextscale.config`."""
    title = (import_module(f"nextscale.config.{module}").__doc__ or "").partition(". ")[0].rstrip(".")
    lines = [f"# {title.replace('`', '')}", "", f"Every setting in `nextscale/config/{module}.py`.", ""]
    for kind in kinds:
        lines += [f"## {kind.__name__}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
        uses = _find_uses().get(kind, [])
        if uses:
            lines += ["In " + ", ".join(uses) + ".", ""]
        lines += _write_table("setting", list(list_fields(kind)))
    return "\n".join(lines)


def list_fields(kind: type) -> Iterator[Option]:
    """The fields of a config; a field that is a config is named as its type."""
    texts, hints = read_field_texts(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, default = _drop_none(hints[field.name]), _find_default(field)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint.__name__.endswith("Config"):
            link = f"[{hint.__name__}]({hint.__module__.rpartition('.')[2]}.md#{hint.__name__.lower()})"
            yield Option(field.name, link, "see there", texts.get(field.name, hint.__doc__ or ""), kind)
        else:
            yield Option(field.name, describe_type(hint), _show(default), texts.get(field.name, ""), kind)


@cache
def _find_uses() -> dict[type, list[str]]:
    """Config -> where it is: the commands whose files of settings have it, and under which name."""
    uses: dict[type, list[str]] = {}

    def add(kind: type, command: str, path: str) -> None:
        page = f"../commands/{command.replace(' ', '-')}.md"
        text = f"[{command}]({page})" + (f" as `{path}`" if path else "")
        uses.setdefault(kind, []).append(text)
        for name, hint in ((n, _drop_none(h)) for n, h in get_type_hints(kind).items()):
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                add(hint, command, f"{path}.{name}".lstrip("."))

    for command in COMMANDS:
        settings = get_type_hints(COMMANDS[command]).get("settings")
        if settings is not None:
            add(settings, command, "")
    return uses


# both


def read_field_texts(kind: type) -> dict[str, str]:
    """Field -> the text below it in the source, of a dataclass and of those that it extends."""
    texts = {}
    for base in reversed(kind.__mro__):
        for before, node in _read_pairs(base.__module__).get(base.__name__, []):
            texts[before] = inspect.cleandoc(node)
    return texts


@cache
def _read_pairs(module: str) -> dict[str, list[tuple[str, str]]]:
    """Class -> (field, the text that follows it), of a module."""
    source = getattr(import_module(module), "__file__", None)
    found: dict[str, list[tuple[str, str]]] = {}
    for node in ast.parse(Path(source).read_text(encoding="utf-8")).body if source else ():
        if isinstance(node, ast.ClassDef):
            for first, second in zip(node.body, node.body[1:], strict=False):
                if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr):
                    found.setdefault(node.name, []).append((ast.unparse(first.target), ast.literal_eval(second.value)))
    return found


def describe_type(hint: Any) -> str:
    """A type in words, such as "number, one or several"."""
    hint, _ = _split_hint(hint)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        kinds = list(dict.fromkeys(describe_type(part) for part in parts if part is not type(None)))
        return f"{kinds[0]}, one or several" if kinds[1:] == [f"{kinds[0]}, several"] else " or ".join(kinds)
    if origin is tuple:
        several = {describe_type(part) for part in parts if part is not Ellipsis}
        return f"{' or '.join(sorted(several))}, {'several' if Ellipsis in parts else len(parts)}"
    if origin is list:
        return f"{describe_type(parts[0])}, several"
    if origin is not None:
        return "table"
    return _TYPES.get(hint, getattr(hint, "__name__", str(hint)))


def _drop_none(hint: Any) -> Any:
    """X of `X | None`; other types as they are."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return parts[0] if isinstance(hint, types.UnionType) and len(parts) == 1 else hint


def _split_hint(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated`, and its annotations."""
    extras = getattr(hint, "__metadata__", ())
    return (hint.__origin__, extras) if extras else (hint, ())


def _find_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _show(default: Any) -> str:
    """A default as it is typed; empty where there is none."""
    if default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, tuple | list):
        default = " ".join(map(str, default))
    return "none" if default is None or default == "" else f"`{default}`"


def _write_table(head: str, options: list[Option]) -> list[str]:
    rows = [
        f"| {_escape(f'`{o.name}`')} | {_escape(o.kind)} | {_escape(o.default or 'required')} "
        f"| {_escape(' '.join(o.text.split()))} |"
        for o in options
    ]
    return [f"| {head} | takes | default | meaning |", "|---|---|---|---|", *rows, ""]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
