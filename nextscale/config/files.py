"""Settings in files: YAML or JSON, the recipes that come with the package, records of runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nextscale.common.digest import add_digest
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.inputs import INPUTS, check_inputs, list_changes
from nextscale.common.reading import read_json
from nextscale.common.reading_yaml import read_yaml
from nextscale.config.migrate import migrate_record, rename_settings
from nextscale.config.parse import from_dict, suggest_name

T = TypeVar("T")
_RECIPES = Path(__file__).parent / "recipes"


def read_settings(kind: type[T], path: Path, base: T | None = None) -> T:
    """Read settings from a YAML or JSON file, or from a recipe by its name. UserError names the file and the key.

    `base`: values of settings that the file leaves out; None = the defaults.
    """
    if not path.is_file() and not path.suffix:
        path = _find_recipe(str(path))
    data = rename_settings(read_yaml(path))
    if isinstance(data, dict):
        data.pop("digest", None)  # of the record of a run
    try:
        return from_dict(kind, {} if data is None else data, str(path), kind() if base is None else base)
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error


def _find_recipe(name: str) -> Path:
    """The file of a recipe; UserError with the nearest name when there is none."""
    known = {p.stem: p for p in _RECIPES.glob("*.yaml")}
    if name not in known:
        raise UserError(f"there is no config file and no recipe named '{name}'{suggest_name(name, sorted(known))}")
    return known[name]


def record_settings(path: Path, settings: dict[str, Any], inputs: Mapping[str, Any] | None = None) -> None:
    """Write a run's settings to `path`, a JSON file in its folder, with their digest, and its inputs to inputs.json.

    Raises UserError naming what differs when the file holds the settings of another run, or the inputs have changed.
    """
    advice = "choose another --out, or delete it"
    if path.exists():
        before = migrate_record(read_json(path))
        if not isinstance(before, dict):
            raise UserError(f"{path} is not the record of a run; choose another --out")
        changed = list_changes({key: before.get(key) for key in settings}, settings)
        if changed:
            raise UserError(
                f"{path.parent} holds a run with other settings: {'; '.join(changed)} ({path.name}); {advice}"
            )
    if inputs is not None:
        check_inputs(path.parent / INPUTS, inputs, path, advice)
        write_json(path.parent / INPUTS, dict(inputs))
    if not path.exists():
        write_json(path, add_digest(settings))
