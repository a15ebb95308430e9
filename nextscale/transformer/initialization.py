"""All initialisation of the transformer, one reason per line (VAR's recipe)."""

from __future__ import annotations

import math

import torch
from torch import nn

from nextscale.config.transformer import InitConfig
from nextscale.transformer.feed_forward.routers import Router
from nextscale.transformer.feed_forward.stacked import StackedLinear
from nextscale.transformer.mamba import Mamba2
from nextscale.transformer.var import VAR

_FIRST_STEPS = (1e-3, 0.1)
"""Between them lie Mamba's steps dt at the start."""


@torch.no_grad()
def initialise(model: VAR, config: InitConfig, generator: torch.Generator) -> VAR:
    """Initialise every parameter of `model` in place from `generator`."""
    D, depth = model.config.width, model.config.depth
    draw_weights(model, D, generator)
    for position in (model.pos_start, model.pos_embed):
        nn.init.trunc_normal_(position, std=_spread(D), generator=generator)
    model.head.weight.mul_(config.head)  # first predictions near uniform
    model.head_adaln.weight.mul_(config.adaln)
    for block in model.blocks:
        for layer in block.layers:  # the residual stream keeps its size over the depth
            if isinstance(layer, Mamba2):
                draw_scan(layer, generator)
            else:
                for last in layer.outputs:
                    last.weight.div_(math.sqrt(2 * depth))
        if block.adaln.offset is not None:
            block.adaln.offset.normal_(generator=generator).div_(math.sqrt(D))
        rows = block.adaln.rows()
        gammas = len(rows) // 3
        rows[:gammas].mul_(config.adaln_gamma)  # near zero: every block starts as the identity
        rows[gammas:].mul_(config.adaln)
    return model


@torch.no_grad()
def draw_weights(part: nn.Module, width: int, generator: torch.Generator) -> None:
    """Draw the weights of all layers and embeddings of a transformer of this width, or a part of it; biases are 0."""

    def normal(tensor: torch.Tensor) -> None:
        nn.init.trunc_normal_(tensor, std=_spread(width), generator=generator)

    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            normal(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, StackedLinear):
            normal(module.weight)
            module.bias.zero_()
    for module in part.modules():
        if isinstance(module, Router) and module.scale_embed is not None:
            module.scale_embed.weight.div_(_spread(width))  # as large as the normalised tokens beside them


@torch.no_grad()
def draw_scan(mamba: Mamba2, generator: torch.Generator) -> None:
    """What Mamba-2 draws beside its projections: `mamba_ssm`'s own choice, but VAR's for the convolution."""
    mamba.A_log.copy_(torch.empty_like(mamba.A_log).uniform_(1, 16, generator=generator).log())
    low, high = _FIRST_STEPS
    dt = torch.empty_like(mamba.dt_bias).uniform_(math.log(low), math.log(high), generator=generator).exp()
    mamba.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
    mamba.D.fill_(1)
    mamba.norm.weight.fill_(1)
    nn.init.trunc_normal_(mamba.conv1d.weight, std=0.02, generator=generator)
    mamba.conv1d.bias.zero_()


def _spread(width: int) -> float:
    return math.sqrt(1 / (3 * width))
