"""Functions from checkpoint to checkpoint that turn dense FFNs into dynamic experts.

They change the FFNs only; attention, embeddings and head stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.parts import get_transformer_config
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.transformer import DynamicConfig, TransformerConfig
from nextscale.sparsify.cluster import run_balanced_kmeans
from nextscale.transformer.feed_forward.dynamic import ExpertRouter
from nextscale.transformer.initialization import initialize_weights

_PROJECTIONS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def check_dense(checkpoint: Checkpoint) -> TransformerConfig:
    """The transformer's config. UserError for a tokenizer without one and for a mixture of experts."""
    model = get_transformer_config(checkpoint.config, "sparsify")
    if model.experts.router != "none":
        raise UserError(
            f"this model is a mixture of experts ({model.experts.router}); nextscale sparsify needs dense FFNs, as the "
            "quality of dynamic experts inside a mixture was never measured: sparsify a dense model instead"
        )
    return model


def replace_gelu(checkpoint: Checkpoint, scales: int, late_only: bool) -> Checkpoint:
    """The checkpoint with ReLU in place of GELU, which must then be tuned (DMoE-VAR, Sec. 2.2).

    `late_only`: the last `scales` scales get copies of the FFNs, with ReLU; the scales before them compute what they
    did.
    """
    model = check_dense(checkpoint)
    if model.dynamic.on:
        raise UserError(
            f"this model's FFNs are another kind already (activation {model.dynamic.activation}, "
            f"{model.dynamic.experts or 'no'} experts); tuning starts from undivided GELU FFNs"
        )
    dynamic = DynamicConfig(scales=_check_scales(checkpoint, scales), activation="relu", late_ffn=late_only)
    weights = dict(checkpoint.transformer)
    if late_only:
        for ffn in _list_ffns(model):
            weights |= {f"{ffn}.late.{name}": weights[f"{ffn}.{name}"].clone() for name in _PROJECTIONS}
    return _replace_model(checkpoint, dynamic, weights)


def _list_ffns(model: TransformerConfig) -> list[str]:
    """Names of the blocks' FFNs in a checkpoint."""
    return [f"blocks.{block}.ffn" for block in range(model.depth)]


def _check_scales(checkpoint: Checkpoint, scales: int) -> int:
    if not 1 <= scales <= len(checkpoint.config.pyramid):
        raise UserError(f"the model has {len(checkpoint.config.pyramid)} scales; {scales} of them cannot be sparse")
    return scales


def split_ffns(checkpoint: Checkpoint, expert_size: int, scales: int, router_width: int, seed: int = 0) -> Checkpoint:
    """The checkpoint with its hidden units in the order of experts, and with new routers.

    Balanced k-means of the rows of fc1, with `expert_size` rows in each cluster, gives the order. It is a permutation,
    so with all experts the model computes what it did. `scales`: how many of the last scales are sparse. It is ignored
    for a model whose late scales have FFNs of their own: then those are sparse.
    """
    model = check_dense(checkpoint)
    if model.dynamic.experts:
        raise UserError(f"this model's FFNs are divided already, into {model.dynamic.experts} experts")
    if not 1 <= expert_size <= model.ffn_width or model.ffn_width % expert_size:
        divisors = [n for n in range(1, model.ffn_width + 1) if model.ffn_width % n == 0 and n >= 8]
        raise UserError(
            f"an FFN of {model.ffn_width} hidden units cannot be divided into experts of {expert_size}; sizes that "
            f"divide it: {', '.join(map(str, divisors))}"
        )
    experts = model.ffn_width // expert_size
    scales = model.dynamic.scales if model.dynamic.late_ffn else _check_scales(checkpoint, scales)
    dynamic = replace(model.dynamic, experts=experts, router_width=router_width, scales=scales)
    weights = dict(checkpoint.transformer)
    for block, ffn in enumerate(tqdm(_list_ffns(model), desc="dividing FFNs", unit="block")):
        cluster_rng, router_rng = (make_generator(seed, purpose, block) for purpose in ("experts", "router"))
        divided = f"{ffn}.late" if model.dynamic.late_ffn else ffn
        order_F = run_balanced_kmeans(weights[f"{divided}.fc1.weight"], experts, cluster_rng).argsort(stable=True)
        for name in ("fc1.weight", "fc1.bias"):
            weights[f"{divided}.{name}"] = weights[f"{divided}.{name}"][order_F]
        weights[f"{divided}.fc2.weight"] = weights[f"{divided}.fc2.weight"][:, order_F].contiguous()
        router = ExpertRouter(model.width, router_width, experts)
        initialize_weights(router, model.width, router_rng)
        weights |= {f"{ffn}.router.{name}": tensor for name, tensor in router.state_dict().items()}
        weights |= {f"{ffn}.{name}": torch.zeros(model.ffn_width) for name in ("importance_F", "activation_F")}
    return _replace_model(checkpoint, dynamic, weights)


def replace_dynamic(checkpoint: Checkpoint, dynamic: DynamicConfig) -> Checkpoint:
    """The checkpoint with other settings of its dynamic experts, and the same weights."""
    return _replace_model(checkpoint, dynamic, checkpoint.transformer)


def _replace_model(checkpoint: Checkpoint, dynamic: DynamicConfig, weights: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint with other settings and weights, and without the thresholds that were calibrated for the old."""
    assert checkpoint.config.transformer is not None, "check_dense has been called"
    config = replace(checkpoint.config, transformer=replace(checkpoint.config.transformer, dynamic=dynamic))
    origin = {name: value for name, value in checkpoint.origin.items() if name != "dynamic"}
    return Checkpoint(config, dict(checkpoint.tokenizer), dict(weights), origin, dict(checkpoint.extras))
