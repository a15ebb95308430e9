"""The files of the classifiers and encoders that this package trains: config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from nextscale.checkpoints import list_shapes
from nextscale.checkpoints.native import read_safetensors
from nextscale.checkpoints.saving import unshare_storage
from nextscale.common.digest import add_digest, check_digest, compute_digest, read_digests, verify_weights
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json
from nextscale.common.reading import read_json
from nextscale.config.parse import from_dict

WEIGHTS = "model.safetensors"
Module = TypeVar("Module", bound=nn.Module)
Part = TypeVar("Part")


def save_module(module: nn.Module, folder: Path, head: dict[str, Any]) -> None:
    """Write the weights to model.safetensors, and `head` (format, version, settings) with digests to config.json."""
    weights = unshare_storage(dict(module.state_dict()))
    with write_atomically(folder / WEIGHTS, folder / "config.json") as (tensors, config):
        save_file(weights, tensors)
        write_json(config, add_digest({**head, "digests": {WEIGHTS: compute_digest(weights)}}))


def read_head(folder: Path, format_name: str, version: int, kind: str) -> dict[str, Any]:
    """The content of config.json; UserError naming the `kind` of model when it has another format or version."""
    head = read_json(folder / "config.json")
    if not isinstance(head, dict) or head.get("format") != format_name or repr(head.get("version")) != str(version):
        raise UserError(f"{folder} is no {kind} of this nextscale: its config.json says another format or version")
    return head


def read_part(kind: type[Part], head: dict[str, Any], name: str, folder: Path) -> Part:
    """The settings in the table `name` of config.json; UserError naming the file and the field."""
    try:
        return from_dict(kind, head.get(name), name)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error


def load_frozen(build: Callable[[], Module], folder: Path, head: dict[str, Any]) -> Module:
    """The module that `build` makes, with the weights of model.safetensors, in evaluation mode without gradients.

    UserError when the file does not fit the module, which is found before memory is taken for it, or when the file or
    `head`, the content of config.json, does not match its digest.
    """
    with torch.device("meta"):
        expected = list_shapes(build())
    weights = read_safetensors(folder / WEIGHTS, expected)
    digests = read_digests(folder / "config.json", head)
    check_digest(folder / "config.json", head, f"accept it with `nextscale info {folder} --accept-changes`")
    verify_weights(folder / WEIGHTS, weights, digests.get(WEIGHTS), everything=True)
    module = build()
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)
