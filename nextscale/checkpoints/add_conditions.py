"""Give a trained model a further condition, such as edges beside its classes, before it is fine-tuned.

Cross-attention in every block and the new part of the condition begin as a network that adds nothing, as ControlNet's
(arXiv 2302.05543, zero convolutions): the model draws at first what it drew before, whatever the new condition says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.checkpoints.parts import get_transformer_config
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.condition import ConditionConfig
from nextscale.config.initialization import InitConfig
from nextscale.transformer.initialization import initialize_transformer
from nextscale.transformer.var import VAR


def add_conditions(checkpoint: Checkpoint, parts: Mapping[str, ConditionConfig], seed: int = 0) -> Checkpoint:
    """The checkpoint with further parts of its condition, which cross-attention reads.

    `parts`: by name, each of kind picture or text. What the model had stays equal bit for bit, and so does what it
    computes until it is trained. `seed` draws the new weights. UserError for a model that reads a sequence already
    (other tokens in it would change what it computes), a quantised one, and a name that its condition has.
    """
    model = get_transformer_config(checkpoint.config, "adapt")
    if checkpoint.is_int8:
        raise UserError("this model is quantised, so it cannot be trained: adapt the model that it was made from")
    condition = _extend_condition(model.condition, parts)
    config = replace(
        checkpoint.config,
        transformer=replace(model, condition=condition, mixers=(*model.mixers, "cross-attention")),
    )
    _, transformer = build_modules(config)
    assert transformer is not None, "the config has a transformer"
    initialize_transformer(transformer, InitConfig(), make_generator(seed, "new condition"))
    _silence(transformer, parts)
    dtype = checkpoint.transformer["head.weight"].dtype
    weights = {key: value.to(dtype) for key, value in transformer.state_dict().items()}
    for key, value in checkpoint.transformer.items():
        new = key
        if key.startswith("condition.") and not model.condition.parts:
            new = f"condition.parts.{model.condition.kind}.{key.removeprefix('condition.')}"
        weights[new] = value if value.shape == weights[new].shape else _insert_layer(value, weights[new])
    return Checkpoint(config, dict(checkpoint.tokenizer), weights, dict(checkpoint.origin))


def _extend_condition(condition: ConditionConfig, parts: Mapping[str, ConditionConfig]) -> ConditionConfig:
    """The condition with further parts."""
    if condition.gives_sequence is not False:
        raise UserError(
            f"the model reads {condition.describe()} by cross-attention: further tokens there would change what it "
            "computes; train a model with a combined condition from the start"
        )
    known = condition.list_parts()
    if repeated := [name for name in parts if name in known]:
        raise UserError(f"the model's condition has a part '{repeated[0]}' already: {condition.describe()}")
    return ConditionConfig(kind="combined", parts={**known, **parts})


@torch.no_grad()
def _silence(transformer: VAR, names: Iterable[str]) -> None:
    """Have the last mixer of every block and the vectors of these parts add nothing.

    adaLN scales the mixer's output by 1 instead of nearly 0: its projection alone is 0, so it learns at once.
    """
    silent: list[Any] = [transformer.condition.get_submodule(f"parts.{name}.pool") for name in names]
    for block in transformer.blocks:
        silent += block.mixers[-1].output_layers
        adaln = block.adaln
        for rows in (adaln.rows, *([] if adaln.linear is None else [adaln.linear.bias])):
            rows.view(3, len(block.layers), -1)[:, -2] = 0
        constant = adaln.offset if adaln.linear is None else adaln.linear.bias
        assert constant is not None, "adaLN has an offset or a bias"
        constant.view(3, len(block.layers), -1)[0, -2] = 1
    if transformer.shared_adaln is not None:
        for parameter in transformer.shared_adaln.parameters():
            parameter.view(3, len(transformer.blocks[0].layers), -1)[:, -2] = 0
    for layer in silent:
        layer.weight.zero_()
        layer.bias.zero_()


def _insert_layer(old: Tensor, new: Tensor) -> Tensor:
    """adaLN's parameters of a block: those of the old layers, and the new ones' for the layer before the last."""
    size = new.numel() - old.numel()  # of one layer's gamma, scale and shift
    layers = new.numel() // size
    result = new.clone()
    kept = [layer for layer in range(layers) if layer != layers - 2]
    result.view(3, layers, -1)[:, kept] = old.reshape(3, layers - 1, -1)
    return result
