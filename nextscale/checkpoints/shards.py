"""Shards: safetensors files that together hold one set of rows, such as the tokens of a cache.

The metadata of a shard holds its own file name, the digest of the JSON table that describes the set ("set"), and the
digest of each tensor. A shard that was damaged, renamed or copied from another set is therefore recognized.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoints.native import read_safetensors
from nextscale.common.digest import compute_digest
from nextscale.common.errors import UserError

Form = tuple[Collection[torch.dtype], tuple[int | None, ...]]
"""Dtypes that a tensor may have, and its shape; None stands for any size."""


def write_shard(draft: Path, path: Path, tensors: Mapping[str, Tensor], owner: str) -> None:
    """Write a shard into the file `draft`, which will be renamed to `path`. `owner`: the digest of its set."""
    about = f"{path.name} {owner}"
    digests = {name: compute_digest({name: tensor}, about) for name, tensor in tensors.items()}
    save_file(dict(tensors), draft, {"file": path.name, "set": owner, "digests": json.dumps(digests)})


def read_shard(path: Path, owner: str, forms: Mapping[str, Form], remedy: str) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped, after comparing names, dtypes and shapes with `forms`.

    UserError, which ends with the remedy, when they differ, or when the shard belongs to another set or number.
    `verify_shard` compares the values.
    """
    try:
        tensors = read_safetensors(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    metadata = _read_metadata(path)
    if metadata.get("file", path.name) != path.name:
        raise UserError(f"{path} was written as {metadata['file']} and moved to another place; {remedy}")
    if owner and metadata.get("set", owner) != owner:
        raise UserError(f"{path} belongs to another folder, whose settings differ; {remedy}")
    if tensors.keys() != forms.keys():
        raise UserError(f"{path} holds {_join(tensors)} instead of {_join(forms)}; {remedy}")
    for name, (dtypes, shape) in forms.items():
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if tensor.dtype not in dtypes or not fits:
            expected = f"{' or '.join(map(_describe, dtypes))} {_join('any' if n is None else n for n in shape)}"
            found = f"{_describe(tensor.dtype)} {_join(tensor.shape)}"
            raise UserError(f"{path}: '{name}' is {found} instead of {expected}; {remedy}")
    return tensors


def verify_shard(path: Path, names: Collection[str] = (), remedy: str = "") -> bool:
    """Compare tensors of a shard, those of `names` or all, with their digests. UserError when one differs.

    Returns False when the file has no digests, as those of earlier versions.
    """
    metadata = _read_metadata(path)
    try:
        digests = json.loads(metadata.get("digests", "{}"))
        about = f"{metadata['file']} {metadata['set']}" if digests else ""
    except (ValueError, KeyError):
        digests, about = {"": ""}, ""
    tensors = read_safetensors(path) if digests else {}
    for name, tensor in tensors.items():
        if (not names or name in names) and compute_digest({name: tensor}, about) != digests.get(name):
            ending = f"; {remedy}" if remedy else ""
            raise UserError(f"{path} is damaged: the values of '{name}' do not match their digest{ending}")
    return bool(digests)


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def _describe(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join(values: object) -> str:
    return ", ".join(map(str, values)) or "nothing"  # type: ignore[call-overload]
