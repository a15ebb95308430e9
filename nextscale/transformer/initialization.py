"""Initialisation of the transformer (VAR's recipe), one reason per line."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.config.initialization import InitConfig
from nextscale.transformer.var import VAR


@torch.no_grad()
def initialize_transformer(model: VAR, config: InitConfig, generator: torch.Generator) -> VAR:
    """Initialise every parameter of `model` in place from `generator`."""
    D, depth = model.config.width, model.config.depth
    initialize_weights(model, D, generator)
    for position in (model.pos_start, *([] if model.pos_embed is None else [model.pos_embed])):
        nn.init.trunc_normal_(position, std=compute_spread(D), generator=generator)
    if model.router_scales is not None:
        initialize_router_scales(model.router_scales, generator)
    model.head.weight.mul_(config.head)  # first predictions near uniform
    model.head_adaln.weight.mul_(config.adaln)
    for block in model.blocks:
        for mixer in block.mixers:
            mixer.initialize(generator)
        for layer in block.layers:
            for last in layer.output_layers:  # the residual stream keeps its size over the depth
                last.weight.div_(math.sqrt(2 * depth))
        if block.adaln.offset is not None:
            block.adaln.offset.normal_(generator=generator).div_(math.sqrt(D))
        rows = block.adaln.rows
        gammas = len(rows) // 3
        rows[:gammas].mul_(config.adaln_gamma)  # near zero: every block starts as the identity
        rows[gammas:].mul_(config.adaln)
    return model


@torch.no_grad()
def initialize_weights(part: nn.Module, width: int, generator: torch.Generator) -> None:
    """Draw the weights of all layers and embeddings of a transformer of this width, or of a part of it; biases are 0.

    A module of another kind draws its own weights in `initialize_weights(spread, generator)`, and rescales them at the
    end in `finish_initialization(spread)`, if it has such methods.
    """
    spread = compute_spread(width)
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=spread, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "initialize_weights"):
            cast(Any, module).initialize_weights(spread, generator)
    for module in part.modules():
        if hasattr(module, "finish_initialization"):
            cast(Any, module).finish_initialization(spread)


@torch.no_grad()
def initialize_router_scales(scales_KD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the scale embeddings that all routers share, as large as normalised tokens; return them."""
    spread = compute_spread(scales_KD.shape[1])
    return nn.init.trunc_normal_(scales_KD, std=spread, generator=generator).div_(spread)


def compute_spread(width: int) -> float:
    """Standard deviation of VAR's initial weights."""
    return math.sqrt(1 / (3 * width))
