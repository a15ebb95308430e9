"""Digests that files carry against damage: CRC-32 of tensors and of JSON tables. They do not protect against forgery.

Weights have theirs in the config.json beside them, shards in their own metadata, JSON tables under the key "digest".
Files of earlier versions have none and are read as they are.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 2**24
"""Bytes of tensors up to which loading verifies a file, at 4 to 7 % of the processor time of a process's first load of
models/var-cifar10. Larger ones: where a command reads them all, and `nextscale info --verify`."""
_SETTLED = 2_000_000_000
"""Nanoseconds since its last change after which a file's times tell about any other; the coarsest clock has 2 s."""
_verified = set[tuple[object, ...]]()
"""Files that this process has verified, as they are and with their digests."""
_LARGEST = 1e10
"""Weights beyond this are damaged: a flipped bit of an exponent gives 1e17 or 1e36."""


def compute_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """CRC-32 of a text and of the names, dtypes, shapes and bytes of tensors by name, 3 GB/s on one core, no copies."""
    import torch

    order = sorted(tensors)
    table = "\n".join(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}" for name in order)
    checksum = zlib.crc32(f"{about}\n{table}".encode())
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.dtype.itemsize])  # numpy has no such floats
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return f"crc32:{checksum:08x}"


def add_digest(table: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON table with the digest of its other entries under "digest"."""
    return {**table, "digest": _compute_json_digest(table)}


def check_digest(path: Path, table: Mapping[str, Any], accept: str = 'delete its "digest" line') -> None:
    """Raise UserError when the JSON table of `path` does not match the digest in it; one without a digest passes.

    Call it after fields were checked one by one, whose messages name the field. `accept`: what accepts an edit.
    """
    if "digest" in table and table["digest"] != _compute_json_digest(table):
        raise UserError(
            f"{path} does not match the digest that was written with it: it is damaged, or it was edited; if the edit "
            f"is intended, {accept}"
        )


def _compute_json_digest(table: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in table.items() if name != "digest"}
    return f"crc32:{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_digests(path: Path, head: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each file beside the config.json `path`; empty where an earlier version wrote it."""
    digests = head.get("digests", {})
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise UserError(f"{path}: digests must be a table of texts, got {digests!r}")
    return digests


def verify_weights(path: Path, tensors: Mapping[str, Tensor], digest: str | None, everything: bool = False) -> None:
    """Raise UserError when tensors do not match their digest or, without one, hold values that weights cannot have.

    Files above SMALL bytes pass, and those that this process verified before, unless `everything`.
    """
    stat = path.stat()
    file = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest)
    if not everything and (file in _verified or sum(tensor.nbytes for tensor in tensors.values()) > SMALL):
        return
    if digest is None:
        check_values(path, tensors)
    elif compute_digest(tensors) != digest:
        raise UserError(
            f"{path} does not match its digest in config.json: it is damaged, or another tool wrote it; if that is "
            f"intended, accept it with `nextscale info {path.parent} --accept-changes`"
        )
    if time.time_ns() - stat.st_ctime_ns > _SETTLED:
        _verified.add(file)


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming a floating-point tensor with a value that is not finite or is beyond all weights."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        values = (tensor if tensor.dtype.itemsize == 4 else tensor.float()).numpy()  # one core, without waiting
        low, high = values.min(), values.max()
        if not -_LARGEST <= low <= high <= _LARGEST:
            raise UserError(f"{path} is damaged: tensor '{name}' has values from {low:g} to {high:g}")
