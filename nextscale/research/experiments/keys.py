"""Names of folders: short checksums of all that decides what lies in them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from nextscale.common.fingerprint import compute_fingerprint
from nextscale.config.parse import to_dict


def key(*parts: Any) -> str:
    """A short checksum of JSON values."""
    return compute_fingerprint({}, json.dumps(parts, sort_keys=True))[:10]


def decides(config: Any) -> dict[str, Any]:
    """The settings that differ from their defaults: a run stays the same run when a new setting comes up."""
    return {
        f.name: decides(value) if dataclasses.is_dataclass(value) else to_dict(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != getattr(type(config)(), f.name)
    }
