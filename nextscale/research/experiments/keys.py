"""Names of folders: short checksums of everything that determines their content."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from nextscale.common.fingerprint import compute_fingerprint
from nextscale.common.inputs import RANDOM_NUMBER_GENERATOR
from nextscale.config.parse import to_dict


def compute_key(*parts: Any) -> str:
    """A short checksum of JSON values."""
    return compute_fingerprint({}, json.dumps(parts, sort_keys=True))[:10]


def compute_key_of_samples(*parts: Any) -> str:
    """`compute_key` of what is made of samples, with the random numbers that they are drawn with."""
    return compute_key(*parts, RANDOM_NUMBER_GENERATOR)


def list_changed_settings(config: Any) -> dict[str, Any]:
    """The settings that differ from their defaults. A run therefore keeps its key when a new setting is added."""
    return {
        f.name: list_changed_settings(value) if dataclasses.is_dataclass(value) else to_dict(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != getattr(type(config)(), f.name)
    }
