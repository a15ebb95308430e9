"""Reading and writing the files that the official checkpoints come in: torch pickles and safetensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoints.native import read_safetensors
from nextscale.errors import UserError
from nextscale.files import replacing


def read_tensors(path: Path, training_key: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch pickle, which is never allowed to run code.

    A training checkpoint of the official trainer holds the state dict under trainer/`training_key`. Raises UserError
    when the file is absent, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    data = _load_pickle(path)
    if isinstance(data, dict) and isinstance(data.get("trainer"), dict):
        data = data["trainer"].get(training_key)
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise UserError(f"{path} holds no state dict (a table of named tensors)")
    return dict(data)


def _load_pickle(path: Path) -> object:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no torch checkpoint that can be read safely (weights_only): {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is damaged or no torch checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict, whole, as safetensors or as a torch pickle according to the suffix."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as (draft,):
        if path.suffix == ".safetensors":
            save_file(tensors, draft)
        else:
            torch.save({n: t.clone() for n, t in tensors.items()}, draft)
