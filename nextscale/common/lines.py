"""Lines of JSON with a checksum against damage, as logs have them.

Lines of earlier versions have none and are read as they are.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json


def format_line(record: Mapping[str, Any]) -> str:
    """A line of JSON with a checksum: the last entry, "crc32", is the CRC-32 of the line without it."""
    text = json.dumps(record)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def parse_line(line: bytes, where: str) -> Any:
    """What `format_line` wrote, without its checksum; a line without one is read as it is.

    Raises UserError starting with `where` when the line does not match its checksum or is no JSON.
    """
    sealed = re.fullmatch(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', line, re.DOTALL)
    if sealed:
        line = sealed[1] + b"}"
        if zlib.crc32(line) != int(sealed[2], 16):
            raise UserError(
                f"{where} does not match its checksum, crc32 {sealed[2].decode()}: it is damaged or was edited"
            )
    return parse_json(line, where, finite=False)
