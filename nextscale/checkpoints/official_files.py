"""Read and write the files of official checkpoints: torch pickles and safetensors."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoints.native import read_safetensors
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically


def read_tensors(path: Path, training_key: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch pickle, which is read without running code.

    A checkpoint of the official trainer holds the state dict under trainer/`training_key`, that of other trainers under
    state_dict. Raises UserError when the file is absent, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    data = _load_pickle(path)
    if isinstance(data, dict) and isinstance(data.get("trainer"), dict):
        data = data["trainer"].get(training_key)
    elif isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not data or not all(_is_named_tensor(k, v) for k, v in data.items()):
        raise UserError(f"{path} holds no state dict (a table of named, dense tensors)")
    return dict(data)


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _load_pickle(path: Path) -> object:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no torch checkpoint that can be read safely (weights_only): {_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly every type
        raise UserError(f"{path} is damaged or no torch checkpoint: {_first_line(error)}") from error


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
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
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
