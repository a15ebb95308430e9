"""The native checkpoint: a folder with config.json and safetensors files.

    config.json                format, version, the ModelConfig with the class names, origin, digests of all files;
                               "weights": "int8" where the transformer has linear layers in 8 bits
    tokenizer.safetensors
    transformer.safetensors    absent for a tokenizer alone
    original.safetensors       only for imported checkpoints with tensors that our modules do not have

Tensors keep their stored dtype on disk. The dtype that a model computes in is chosen when it is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nextscale.checkpoints import Checkpoint, Shape, build_on_meta, check_floating, check_tensors, list_shapes
from nextscale.common.digest import check_digest, read_digests, verify_weights
from nextscale.common.errors import UserError
from nextscale.common.reading import read_json
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

FORMAT, VERSION = "nextscale", 2
TOKENIZER, TRANSFORMER, ORIGINAL = "tokenizer.safetensors", "transformer.safetensors", "original.safetensors"
_LARGE = 2**18
"""Elements from which a tensor gets a memory mapping of its own."""


def find_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The checkpoint's folder, downloaded from the hub if `source` is no folder."""
    if Path(source).is_dir():
        return Path(source)
    from nextscale.checkpoints.hub import find_checkpoint

    return find_checkpoint(source, revision=revision, token=token)


def check_routers(source: object, checkpoint: Checkpoint) -> None:
    """UserError when the routers of dynamic experts were trained for other weights than the checkpoint's."""
    if checkpoint.config.transformer is not None and checkpoint.config.transformer.dynamic.router_fingerprint:
        from nextscale.checkpoints.router_fingerprint import check_router_fingerprint

        check_router_fingerprint(source, checkpoint)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The folder's ModelConfig and its `origin`, without reading the weights. UserError when it is no checkpoint."""
    head = _read_head(folder)
    return head.config, head.origin


@dataclass(frozen=True)
class _Head:
    """What config.json holds."""

    config: ModelConfig
    origin: dict[str, Any]
    version: int
    digests: dict[str, str]
    weights: str | None
    """int8 where the transformer has linear layers in 8 bits."""


def _read_head(folder: Path) -> _Head:
    """The content of a folder's config.json."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no nextscale checkpoint: it has no config.json")
    head = read_json(folder / "config.json")
    if isinstance(head, dict) and head.get("format") == "nextscale-lora":
        raise UserError(f"{folder} is an adapter (LoRA): give its model, and the adapter with --lora {folder}")
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise UserError(f'{folder}/config.json was not written by nextscale (no "format": "{FORMAT}")')
    version = head.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise UserError(
            f"{folder}/config.json has format version {version!r}, this nextscale reads up to {VERSION}; "
            f"it was written by nextscale {head.get('library')}: update with pip install -U nextscale"
        )
    origin = head.get("origin") or {}
    if not isinstance(origin, dict):
        raise UserError(f"{folder}/config.json: origin must be a table, got {origin!r}")
    settings = head.get("model")
    try:
        if version == 1:
            from nextscale.config.migrate import rename_settings

            settings = rename_settings(settings)
        config = from_dict(ModelConfig, settings, "model")
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    digests = read_digests(folder / "config.json", head)
    check_digest(folder / "config.json", head, f"accept it with `nextscale info {folder} --accept-changes`")
    return _Head(config, origin, version, digests, head.get("weights"))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder and compare all weights with their digests. UserError names the file and the tensor at fault."""
    return read_modules(folder, verify=True)[0]


def read_modules(
    folder: Path, *, verify: bool = False, int8: bool = False
) -> tuple[Checkpoint, tuple[Tokenizer, VAR | None]]:
    """A folder's checkpoint and its modules on the meta device, against which names and shapes were checked.

    Small files are compared with their digests, see `digest.SMALL`; with `verify` all are. `int8`: whether the caller
    can use linear layers in 8 bits, which are refused otherwise.
    """
    head = _read_head(folder)
    config, origin = head.config, head.origin
    _check_layers(folder, config)
    tokenizer, transformer = build_on_meta(config)
    tensors, weights, integers = read_safetensors(folder / TOKENIZER, list_shapes(tokenizer)), {}, set[str]()
    added: dict[str, Tensor] = {}
    if head.weights is not None:
        from nextscale.checkpoints.quantise import prepare_modules

        integers = prepare_modules(folder, head.weights, transformer, usable=int8)
    if transformer is not None:
        expected = list_shapes(transformer)
        if config.transformer is not None and config.transformer.dynamic.experts:
            from nextscale.checkpoints.migrate import make_missing

            added = make_missing(read_shapes(folder / TRANSFORMER), expected)
        held = {name: shape for name, shape in expected.items() if name not in added}
        weights = read_safetensors(folder / TRANSFORMER, held, integers)
    extras = read_safetensors(folder / ORIGINAL) if ORIGINAL in head.digests or (folder / ORIGINAL).exists() else {}
    for name, part in ((TOKENIZER, tensors), (TRANSFORMER, weights), (ORIGINAL, extras)):
        if part:
            verify_weights(folder / name, part, head.digests.get(name), verify)
    if head.version == 1 and config.transformer is not None and config.transformer.dynamic.router_fingerprint:
        from nextscale.checkpoints.migrate import migrate_router_fingerprint

        config = migrate_router_fingerprint(config, weights)
    return Checkpoint(config, tensors, weights | added, origin, extras), (tokenizer, transformer)


def _check_layers(folder: Path, config: ModelConfig) -> None:
    """Raise UserError where config.json asks for more or fewer layers, scales or tokens than the weights' headers list.

    This comes before modules are built, as a damaged number could ask for millions.
    """
    codes, model = config.tokenizer, config.transformer
    layers = [
        (TOKENIZER, "tokenizer.res_blocks", codes.res_blocks, r"encoder\.levels\.0\.blocks\.(\d+)\."),
        (
            TOKENIZER,
            "the length of tokenizer.channel_multipliers",
            len(codes.channel_multipliers),
            r"encoder\.levels\.(\d+)\.",
        ),
        (TOKENIZER, "tokenizer.num_phi", codes.num_phi if codes.phi_ratio > 0 else 0, r"quantizer\.phi\.(\d+)\."),
    ]
    layers += [(TRANSFORMER, "transformer.depth", model.depth, r"blocks\.(\d+)\.")] if model else []
    shapes = {name: read_shapes(folder / name) for name in {name for name, *_ in layers}}
    for name, setting, asked, pattern in layers:
        found = 1 + max((int(m[1]) for n in shapes[name] if (m := re.match(pattern, n))), default=-1)
        if found != asked:
            raise UserError(f"{folder}/config.json: model.{setting} is {asked}, but {name} holds {found}")
    held, length = shapes.get(TRANSFORMER, {}).get("pos_embed", ()), config.pyramid.length
    if len(held) == 3 and held[1] != length:
        raise UserError(f"{folder}/config.json: model.pyramid has {length} tokens, but {TRANSFORMER} holds {held[1]}")


def _check_shapes(path: Path, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    """Raise UserError naming tensors that the model of config.json has not, or lacks."""
    try:
        check_tensors(path, found, expected)
    except UserError as error:
        raise UserError(f"{error}; the model is that of {path.parent}/config.json") from error


def read_shapes(path: Path) -> dict[str, Shape]:
    """Name and shape of each tensor of a safetensors file, from its header alone."""
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def read_safetensors(
    path: Path, expected: dict[str, Shape] | None = None, integers: Collection[str] = ()
) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped. `expected`: names and shapes, checked before any tensor is read; all are
    floating-point but `integers`, which are int8.

    Every large tensor has a mapping of its own, so memory is freed tensor by tensor when a caller converts them.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if expected is not None:
                _check_shapes(path, shapes, expected)
            small = {name for name, shape in shapes.items() if math.prod(shape) < _LARGE}
            tensors = {name: file.get_tensor(name) for name in shapes if name in small}
        for name in shapes.keys() - small:
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        tensors = {name: tensors[name] for name in shapes}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    if expected is not None:
        check_floating(path, tensors, integers)
    return tensors
