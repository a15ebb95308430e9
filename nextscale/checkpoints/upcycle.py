"""Sparse upcycling (arXiv 2212.05055): a trained dense model becomes a mixture of experts that computes the same.

Every expert starts as a copy of the dense FFN, so with gates that sum to 1 any experts compute what the dense FFN does.
Only the routers are new. The copies diverge during training because they see different tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.parts import get_transformer_config
from nextscale.common.errors import UserError
from nextscale.common.registry import ROUTERS
from nextscale.common.rng import make_generator
from nextscale.config.transformer import ExpertsConfig, TransformerConfig
from nextscale.transformer.initialization import initialize_router_scales, initialize_weights

EXACT_ROUTERS = ("stmoe", "smoe")
"""Routers that give every token experts which all have an FFN."""


def upcycle(checkpoint: Checkpoint, experts: ExpertsConfig, seed: int = 0, noise: float = 0.0) -> Checkpoint:
    """The checkpoint with mixtures of experts in place of its dense FFNs; all other weights stay equal bit for bit.

    `experts.renormalise` becomes true: the gates of the selected experts are divided by their sum. `seed` draws the
    routers, in float32, as training from scratch does. `noise` adds normal noise to the copies, as a share of the
    standard deviation of each weight; outputs are then only close to the dense model's. Raises UserError for a
    tokenizer alone, for a mixture, and for routers with which a mixture of copies does not equal the dense model.
    """
    model = _check_dense(checkpoint)
    if experts.router not in EXACT_ROUTERS:
        raise UserError(
            f"upcycling to experts.router '{experts.router}' would not give what the dense model does: "
            f"{_REASONS[experts.router]}; routers that do: {', '.join(EXACT_ROUTERS)}"
        )
    if not 0 <= noise < float("inf"):
        raise UserError(f"noise must be 0 or more; got {noise}")
    model = replace(model, experts=replace(experts, renormalise=True))
    config = replace(checkpoint.config, transformer=model)
    weights: dict[str, Tensor] = {}
    for name, tensor in checkpoint.transformer.items():
        before, ffn, layer = name.partition(".ffn.")
        if ffn:
            weights[f"{before}.ffn.experts.{layer}"] = _copy_weights(tensor, experts.count, noise, (seed, name))
        else:
            weights[name] = tensor
    for block in range(model.depth):
        router = ROUTERS.get(experts.router)(model, len(config.pyramid), block)
        initialize_weights(router, model.width, make_generator(seed, "router", block))
        weights |= {f"blocks.{block}.ffn.router.{n}": t for n, t in router.state_dict().items()}
    if model.experts.has_shared_scales:
        scales_KD = torch.empty(len(config.pyramid), model.width)
        weights["router_scales"] = initialize_router_scales(scales_KD, make_generator(seed, "router", "scales"))
    return Checkpoint(config, dict(checkpoint.tokenizer), weights, dict(checkpoint.origin))


_REASONS = {
    "none": "it is the dense FFN itself",
    "expert-choice": "a token that no expert takes would get nothing",
    "moe++": "a token that selects zero-computation experts would get only a part",
}


def _check_dense(checkpoint: Checkpoint) -> TransformerConfig:
    """The transformer's config; UserError when its FFNs are not dense."""
    model = get_transformer_config(checkpoint.config, "upcycle")
    if model.experts.router != "none":
        raise UserError(
            f"this model is a mixture of experts already ({model.experts.router}); upcycling needs a dense one"
        )
    if model.dynamic.on:
        raise UserError("this model's FFNs are dynamic ones: upcycle the model that it was made of, then sparsify that")
    return model


def _copy_weights(tensor: Tensor, count: int, noise: float, purpose: tuple[int, str]) -> Tensor:
    """`count` stacked copies of an FFN's weight or bias; noise is added to copies of weights, not of biases."""
    stacked = tensor.unsqueeze(0).repeat(count, *[1] * tensor.ndim)
    if noise and tensor.ndim == 2:
        drawn = torch.randn(stacked.shape, generator=make_generator(purpose[0], "upcycle", purpose[1]))
        stacked = (stacked.float() + noise * tensor.float().std() * drawn).to(tensor.dtype)
    return stacked
