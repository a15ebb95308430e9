"""Read YAML strictly: settings that people write. No other module parses YAML."""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json, read_text

_LARGEST = 2**20
_DEEPEST, _MOST_NODES = 40, 100_000


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of up to 1 MiB, or a .json file.

    Raises UserError naming the file, and the line where there is one: for what is no YAML, a name that stands twice in
    a table, references that blow up or contain themselves, nesting of more than 40 levels, and integers with a leading
    zero, which may be decimal or octal. Dates and times are text, 1e-4 is a number.
    """
    import yaml

    if not path.exists():
        raise UserError(f"cannot read config {path}: there is no such file")
    text = read_text(path, _LARGEST)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("{"):
        return parse_json(text, f"config {path}")
    try:
        return yaml.load(text, _make_loader())
    except RecursionError:
        raise UserError(f"config {path} is nested too deeply") from None
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is no YAML: {error}") from error


@cache
def _make_loader() -> Any:
    """The class of the loader; made when it is needed, because importing yaml takes time."""
    import yaml
    from yaml.constructor import ConstructorError

    class StrictLoader(yaml.SafeLoader):
        """SafeLoader without what silently reads as something else."""

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _measure_tree(node, {}, 0)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            lines: dict[Any, int] = {}
            for key_node, _ in node.value:  # before << is merged: a merged name may be given anew
                line = key_node.start_mark.line + 1
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise ConstructorError(None, None, "a list or table as a name", key_node.start_mark)
                if key in lines:
                    raise UserError(f"'{str(key)[:80]}' stands twice in a table: in line {lines[key]} and line {line}")
                lines[key] = line
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            text = self.construct_scalar(node)
            line = node.start_mark.line + 1
            if re.fullmatch(r"[-+]?0[0-9_]+", text):
                raise UserError(f"line {line}: {text[:20]} may be decimal or octal; write it without the leading zero")
            if len(text) > 60:
                raise UserError(f"line {line}: {text[:20]}... is no integer of 64 bits")
            return super().construct_yaml_int(node)

    StrictLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    integer = r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)"
    real = r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    real += r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
    for tag, pattern in (("float", real), ("int", integer)):
        StrictLoader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list("-+0123456789.")
        )
    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
    return StrictLoader


def _measure_tree(node: Any, sizes: dict[int, int | None], depth: int) -> int:
    """Nodes below `node` when references are written out. UserError when they are too many, too deep or circular."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise UserError(f"line {node.start_mark.line + 1}: a reference contains itself")
        return size
    if depth > _DEEPEST:
        raise UserError(f"line {node.start_mark.line + 1}: nested too deeply")
    sizes[id(node)] = None
    inner = node.value if isinstance(node.value, list) else []
    parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
    size = 1 + sum(_measure_tree(part, sizes, depth + 1) for part in parts)
    if size > _MOST_NODES:
        raise UserError(f"line {node.start_mark.line + 1}: references to it would give more than {_MOST_NODES} values")
    sizes[id(node)] = size
    return size
