"""Read JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError when it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def has_format(folder: Path, name: str) -> bool:
    """Whether the folder's config.json names this format (its key "format")."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("format") == name
    except (OSError, ValueError, AttributeError):
        return False


def is_hub_name(text: str) -> bool:
    """Whether a text has the form owner/name of a repository on the Hugging Face hub."""
    return re.match(r"^[\w.-]+/[\w.-]+$", text) is not None
