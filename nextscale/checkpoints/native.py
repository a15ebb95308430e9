"""The native checkpoint: a folder with config.json and safetensors files.

    config.json                format, version, the whole ModelConfig, class names
    tokenizer.safetensors
    transformer.safetensors    absent for a tokenizer alone
    original.safetensors       only where an imported file had tensors that our modules do not need

Tensors keep their stored dtype on disk; what they compute in is decided when they are loaded.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import nextscale
from nextscale.checkpoints import (
    Checkpoint,
    Shape,
    build_on_meta,
    check_floating,
    check_tensors,
    list_shapes,
)
from nextscale.common.errors import UserError
from nextscale.common.files import read_json, write_atomically, write_json
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

FORMAT, VERSION = "nextscale", 1
_OWN_MAPPING = 2**18
"""Values from which a tensor is mapped by itself."""
TOKENIZER, TRANSFORMER, ORIGINAL = "tokenizer.safetensors", "transformer.safetensors", "original.safetensors"


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the folder; all files are complete on disk before the first one replaces an older one."""
    parts = {TOKENIZER: checkpoint.tokenizer, TRANSFORMER: checkpoint.transformer, ORIGINAL: checkpoint.extras}
    parts = {name: tensors for name, tensors in parts.items() if tensors}
    head = {
        "format": FORMAT,
        "version": VERSION,
        "library": nextscale.__version__,
        "model": to_dict(checkpoint.config),
        "origin": checkpoint.origin,
    }
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save to {folder}: it is a file, not a folder")
    with write_atomically(*(folder / name for name in parts), folder / "config.json") as drafts:
        for draft, tensors in zip(drafts[:-1], parts.values(), strict=True):
            save_file(unshare_storage(tensors), draft)
        write_json(drafts[-1], head)
    for name in {TOKENIZER, TRANSFORMER, ORIGINAL} - set(parts):
        (folder / name).unlink(missing_ok=True)


def unshare_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage with one another, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def read_config(folder: Path) -> tuple[ModelConfig, dict]:
    """The folder's ModelConfig and its `origin`, without touching the weights."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no nextscale checkpoint: it has no config.json")
    head = read_json(folder / "config.json")
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise UserError(f'{folder}/config.json was not written by nextscale (no "format": "{FORMAT}")')
    if not isinstance(head.get("version"), int) or not 1 <= head["version"] <= VERSION:
        raise UserError(
            f"{folder} has format version {head.get('version')}, this nextscale reads up to {VERSION}; "
            f"it was written by nextscale {head.get('library')}: update with pip install -U nextscale"
        )
    origin = head.get("origin") or {}
    if not isinstance(origin, dict):
        raise UserError(f"{folder}/config.json: origin must be a table, got {origin!r}")
    try:
        return from_dict(ModelConfig, head.get("model"), "model"), origin
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder. Raises UserError naming the file and the tensor at fault."""
    return read_modules(folder)[0]


def read_modules(folder: Path) -> tuple[Checkpoint, tuple[Tokenizer, VAR | None]]:
    """A folder's checkpoint, and the modules it is for, on the meta device: what its tensors were checked against."""
    config, origin = read_config(folder)
    tokenizer, transformer = build_on_meta(config)
    tensors = read_safetensors(folder / TOKENIZER, list_shapes(tokenizer))
    weights = read_safetensors(folder / TRANSFORMER, list_shapes(transformer)) if transformer is not None else {}
    extras = read_safetensors(folder / ORIGINAL) if (folder / ORIGINAL).exists() else {}
    return Checkpoint(config, tensors, weights, origin, extras), (tokenizer, transformer)


def read_safetensors(path: Path, expected: dict[str, Shape] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped; with `expected`, names and shapes are checked before any is read.

    Every large tensor has a mapping of its own, so that who converts and drops one gives its memory back.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if expected is not None:
                check_tensors(path, shapes, expected)
            small = {name for name, shape in shapes.items() if math.prod(shape) < _OWN_MAPPING}
            tensors = {name: file.get_tensor(name) for name in shapes if name in small}
        for name in shapes.keys() - small:
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        tensors = {name: tensors[name] for name in shapes}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    if expected is not None:
        check_floating(path, tensors)
    return tensors
