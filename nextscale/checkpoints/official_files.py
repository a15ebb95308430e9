"""Read and write the files of official and other checkpoints: torch pickles and safetensors, whole or in shards."""

from __future__ import annotations

import argparse
import codecs
import pathlib
import pickle
import re
import struct
import types
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoints.native import FORMAT, read_safetensors
from nextscale.checkpoints.state_dicts import find_state_dict
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically
from nextscale.common.notes import print_note
from nextscale.common.reading import has_format
from nextscale.config.parse import read_record

_INDEX = (".safetensors.index.json", ".bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
_NO_WEIGHTS = re.compile("optimizer|scheduler|sampler|scaler|random_states|training_args|rng_state|dl_state")
"""Names of the other files that accelerate and transformers write beside the weights."""


def read_tensors(path: Path, *anchors: str, prefer: str = "") -> dict[str, Tensor]:
    """The tensors of a network, from a file or folder as training programs write them; no code in it is run.

    Takes a torch pickle or a .safetensors file, shards with their index (`model.safetensors.index.json`,
    `pytorch_model.bin.index.json`) and a folder with one of these. `anchors` and `prefer` say which of the tensors
    are returned, as in `find_state_dict`. Stored dtypes are kept. Raises UserError when the file is absent or damaged,
    and naming what was found when it is not clear which tensors are the network's.
    """
    file = _find_file(path)
    if file.name.endswith(_INDEX):
        data: Any = _read_shards(file)
    elif file.suffix == ".safetensors":
        data = read_safetensors(file)
    else:
        data = _load_pickle(file)
    return find_state_dict(file, data, [anchor for anchor in anchors if anchor], prefer)


def _find_file(path: Path) -> Path:
    """The weights file, or the index of shards, that a path means."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.safetensors|\.bin)", path.name)
        if shard and int(shard[2]) > 1:
            raise UserError(
                f"{path} is one of {int(shard[2])} shards; give {shard[1]}{shard[3]}.index.json or the folder"
            )
        return path
    if has_format(path, FORMAT):
        raise UserError(f"{path} is a nextscale checkpoint already; it needs no import")
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    indices = [f for f in files if f.name.endswith(_INDEX)]
    if not indices:
        indices = [f for f in files if f.suffix in _SUFFIXES and not _NO_WEIGHTS.match(f.name)]
    if len(indices) > 1 and len({f.name.split(".")[0].replace("pytorch_", "") for f in indices}) == 1:
        indices = sorted(indices, key=lambda f: ".safetensors" not in f.name)[:1]
        print_note(f"weights {path}", f"{path} holds its weights in several formats; {indices[0].name} is used")
    if len(indices) != 1:
        names = ", ".join(f.name for f in (indices or files)[:8]) or "nothing"
        found = f"{len(indices)} files of weights" if indices else "no file of weights"
        raise UserError(f"{path} holds {found} ({names}): give the file itself")
    return indices[0]


@dataclass(frozen=True)
class _Index:
    """What the index of shards holds."""

    weight_map: dict[str, str]
    """The file of each tensor."""
    other: dict[str, Any] = field(default_factory=dict)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists. UserError naming a shard that is absent or holds others."""
    places = read_record(_Index, index).weight_map
    if not places:
        raise UserError(f"{index}: weight_map lists no tensors")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(_SUFFIXES):
            raise UserError(f"{index}: weight_map names '{name}', which is no file of weights in its folder")
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{shard} is missing: {index} names it")
        content = read_safetensors(shard) if shard.suffix == ".safetensors" else _load_pickle(shard)
        if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
            raise UserError(f"{shard} holds no state dict (a table of named tensors)")
        listed = {tensor for tensor, file in places.items() if file == name}
        if listed != content.keys():
            wrong = sorted(map(str, listed ^ content.keys()))
            raise UserError(f"{shard} does not hold what {index} lists: '{wrong[0]}' is in only one of them")
        tensors |= content
    return {name: tensors[name] for name in places}


def _make_table(*factory: object) -> OrderedDict:
    """Stands for collections.defaultdict, which weights_only cannot fill."""
    return OrderedDict()


_HARMLESS: list[Any] = [
    argparse.Namespace, types.SimpleNamespace, (_make_table, "collections.defaultdict"),
    Counter, set, frozenset, dict, list, tuple, int, float, bool, str,
    pathlib.PurePosixPath, (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib.WindowsPath"), (pathlib.PurePosixPath, "pathlib.PureWindowsPath"),
    *((OrderedDict, f"{module}.AttributeDict") for module in (
        "pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing",
        "lightning_fabric.utilities.data", "lightning.fabric.utilities.data",
    )),
]  # fmt: skip
"""Containers of settings that checkpoints hold beside the weights; making one runs no code of the file."""


def _load_pickle(path: Path) -> object:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        check_zip(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS + _list_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no torch checkpoint that can be read safely (weights_only): {_name_refused(error)}"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly every type
        raise UserError(f"{path} is damaged or no torch checkpoint: {_first_line(error)}") from error


def _list_numpy_scalars() -> list[Any]:
    """What a pickled number of numpy needs, such as the best accuracy so far."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    return [np.dtype, codecs.encode, *kinds, *((scalar, f"{module}.scalar") for module in modules)]


def _name_refused(error: Exception) -> str:
    """What weights_only refused: the class that the file would make, where the message names one."""
    name = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", str(error))
    if name is None:
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        return reason[1] if reason else _first_line(error)
    return f"it holds a {name[1] or name[2]}; save the state dict alone (torch.save(model.state_dict(), NEW))"


ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, KeyError, struct.error)
"""What reading a damaged zip archive raises."""


def check_zip(path: Path) -> None:
    """Compare each member of a zip archive with its CRC-32, which torch.load does not. UserError names a damaged one.

    Members without a CRC-32 (`torch.serialization.set_crc32_options(False)`) are passed over.
    """
    name = "its directory"
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.CRC:
                    continue
                name = f"'{member.filename}'"
                with archive.open(member) as content:
                    while content.read(2**20):
                        pass
    except ZIP_ERRORS as error:
        raise UserError(f"{path} is damaged: {name} in the archive cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write_tensors(files: dict[Path, dict[str, Tensor]]) -> None:
    """Write state dicts as safetensors or torch pickles, by the suffix of each path. All are written, or none."""
    with write_atomically(*files) as drafts:
        for draft, (path, tensors) in zip(drafts, files.items(), strict=True):
            separate = {n: t.contiguous().clone() for n, t in tensors.items()}
            if path.suffix == ".safetensors":
                save_file(separate, draft)
            else:
                torch.save(separate, draft)
