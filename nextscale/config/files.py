"""Settings from YAML or JSON files and from the named recipes that come with the package. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from nextscale.common.errors import UserError
from nextscale.config.parse import from_dict, suggest_name

T = TypeVar("T")
_RECIPES = Path(__file__).parent / "recipes"


def read_settings(kind: type[T], path: Path) -> T:
    """A YAML or JSON file, or a recipe by its name, as settings. UserError names the file and the key at fault."""
    if not path.is_file() and not path.suffix:
        path = _recipe(str(path))
    data = read_yaml(path)
    return from_dict(kind, {} if data is None else data, str(path), kind())


def read_yaml(path: Path) -> Any:
    """A YAML or JSON file; UserError when it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is no YAML: {' '.join(str(error).split())}") from error


def _recipe(name: str) -> Path:
    """The file of a named recipe; UserError with the nearest name when there is none."""
    known = {p.stem: p for p in _RECIPES.glob("*.yaml")}
    if name not in known:
        raise UserError(f"there is no config file and no recipe named '{name}'{suggest_name(name, sorted(known))}")
    return known[name]
