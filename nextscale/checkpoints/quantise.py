"""A checkpoint with the linear layers of its transformer in 8 bits, for inference on a CPU (`nextscale quantise`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nextscale.checkpoints import Checkpoint, build_on_meta
from nextscale.checkpoints.native import ORIGINAL
from nextscale.common.errors import UserError
from nextscale.common.reading import read_json
from nextscale.transformer.int8 import quantise_layers
from nextscale.transformer.var import VAR


@torch.no_grad()
def quantise_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The layers of `nextscale.transformer.int8.LAYERS` in 8 bits, all else as it is stored; UserError without any."""
    _, transformer = build_on_meta(checkpoint.config)
    if transformer is None:
        raise UserError("this checkpoint is a tokenizer alone; only the linear layers of a transformer are quantised")
    transformer.load_state_dict(checkpoint.transformer, assign=True)
    return replace(checkpoint, transformer=quantise_layers(transformer).state_dict())


def prepare_modules(folder: Path, weights: str, transformer: VAR | None, *, usable: bool) -> set[str]:
    """Give a transformer on the meta device the layers of a quantised folder; the names of the tensors that are int8.

    `weights`: what config.json says. `usable`: whether the caller can use it. UserError otherwise.
    """
    if weights != "int8" or transformer is None:
        raise UserError(f"{folder}/config.json: weights must be 'int8' or missing, got {weights!r}")
    if not usable:
        raise UserError(
            f"{folder} has linear layers in int8, which can be sampled, scored and measured, but not trained or "
            "converted; use the model that `nextscale quantise` made it from"
        )
    quantise_layers(transformer)
    return {name for name, tensor in transformer.state_dict().items() if tensor.dtype == torch.int8}


def describe_weights(folder: Path) -> dict[str, Any]:
    """For `nextscale info`: the type and bytes of a quantised folder's weights; empty for another folder."""
    weights = read_json(folder / "config.json").get("weights")
    files = (file for file in folder.glob("*.safetensors") if file.name != ORIGINAL)
    return {"weights": weights, "weight_bytes": sum(f.stat().st_size for f in files)} if weights else {}
