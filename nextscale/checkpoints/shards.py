"""Shards: safetensors files that together hold one set of rows, such as the tokens of a cache.

The metadata of a shard holds its own file name, the digest of the JSON table that describes the set ("set"), and the
digest of each tensor. A shard that was damaged, renamed or copied from another set is therefore recognized.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoints.native import read_safetensors
from nextscale.common.digest import check_digest, compute_digest
from nextscale.common.errors import UserError
from nextscale.common.precision import get_name
from nextscale.common.reading import parse_json, read_json

_KEY = "nextscale"
"""Of the metadata."""
Form = tuple[Collection[torch.dtype], tuple[int | None, ...]]
"""Dtypes that a tensor may have, and its shape; None stands for any size."""


def read_owner(path: Path) -> str:
    """The digest of the JSON table that describes a set of shards; empty where an earlier version wrote it."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table of settings; delete its folder to begin anew")
    check_digest(path, table, "delete its folder to begin anew")
    return str(table.get("digest", ""))


def write_shard(draft: Path, path: Path, tensors: Mapping[str, Tensor], owner: str) -> None:
    """Write a shard into the file `draft`, which will be renamed to `path`. `owner`: the digest of its set."""
    about = f"{path.name} {owner}"
    digests = {name: compute_digest({name: tensor}, about) for name, tensor in tensors.items()}
    about_shard = json.dumps({"file": path.name, "set": owner, "digests": digests}, sort_keys=True)
    save_file(dict(tensors), draft, {_KEY: about_shard})  # one entry, as safetensors writes several in any order


def read_shard(path: Path, owner: str, forms: Mapping[str, Form], remedy: str) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped, after comparing names, dtypes and shapes with `forms`.

    UserError, which ends with the remedy, when they differ, or when the shard belongs to another set or number.
    `verify_shard` compares the values.
    """
    try:
        tensors = read_safetensors(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    check_place(path, owner, remedy)
    if tensors.keys() != forms.keys():
        raise UserError(f"{path} holds {_join(tensors)} instead of {_join(forms)}; {remedy}")
    for name, (dtypes, shape) in forms.items():
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if tensor.dtype not in dtypes or not fits:
            expected = f"{' or '.join(map(get_name, dtypes))} {_join('any' if n is None else n for n in shape)}"
            found = f"{get_name(tensor.dtype)} {_join(tensor.shape)}"
            raise UserError(f"{path}: '{name}' is {found} instead of {expected}; {remedy}")
    return tensors


def check_place(path: Path, owner: str, remedy: str) -> None:
    """Raise UserError when the shard was written under another name or for another set; an owner "" is any."""
    metadata = _read_metadata(path)
    if metadata.get("file", path.name) != path.name:
        raise UserError(f"{path} was written as {metadata['file']}, in the place of another shard; {remedy}")
    if owner and metadata.get("set", owner) != owner:
        raise UserError(f"{path} was written for another folder, with other settings; {remedy}")


def verify_shard(path: Path, names: Collection[str] = (), remedy: str = "") -> bool:
    """Compare tensors of a shard, those of `names` or all, with their digests. UserError when one differs.

    Returns False when the file has no digests, as those of earlier versions.
    """
    metadata = _read_metadata(path)
    digests, about = metadata.get("digests"), f"{metadata.get('file')} {metadata.get('set')}"
    if not isinstance(digests, dict):
        return False
    for name, tensor in read_safetensors(path).items():
        if (not names or name in names) and compute_digest({name: tensor}, about) != digests.get(name):
            ending = f"; {remedy}" if remedy else ""
            raise UserError(f"{path} is damaged: the values of '{name}' do not match their digest{ending}")
    return True


def check_range(path: Path, tensors: Mapping[str, Tensor], stops: Mapping[str, int], remedy: str) -> None:
    """Raise UserError when the integers of a tensor are not 0 to below its stop."""
    for name, stop in stops.items():
        low, high = int(tensors[name].min()), int(tensors[name].max())
        if not 0 <= low <= high < stop:
            raise UserError(f"{path} is damaged: {name} are {low} to {high}, not 0 to {stop - 1}; {remedy}")


def _read_metadata(path: Path) -> dict[str, Any]:
    """What `write_shard` says of a shard; empty for a file that it did not write."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY, "{}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        metadata = parse_json(text, "its metadata")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is damaged: its metadata cannot be read")
    return metadata


def _join(values: object) -> str:
    return ", ".join(map(str, values)) or "nothing"  # type: ignore[call-overload]
