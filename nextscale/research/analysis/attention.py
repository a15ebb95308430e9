"""Attention to a token's own scale and to earlier ones: how the softmax of each block is shared out (M-VAR).

M-VAR (arXiv 2411.10433) calls the two parts intra-scale and inter-scale.

Letters: S blocks with attention to all scales, K scales, B images, N tokens at hand, D width, H heads, d head width,
M tokens visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.precision import widen
from nextscale.config.analysis import AnalysisConfig
from nextscale.pyramid import Pyramid
from nextscale.research.analysis.analyzed_model import AnalyzedModel, describe_analysis, open_models
from nextscale.research.analysis.figures import plot_attention
from nextscale.transformer.attention import Attention
from nextscale.transformer.context import ScaleContext


def analyse_attention(
    models: Sequence[str], data: str, out: Path, config: AnalysisConfig | None = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Attention by scales on held-out images of `data`; writes attention.json and attention.png into `out`.

    Returns the content of attention.json. Raises UserError for a model without attention to earlier scales, or for data
    that is not the model's.
    """
    config = config or AnalysisConfig()
    reports = [measure_attention(analyzed) for analyzed in open_models(models, names, data, config)]
    report = {"analysis": "attention", **describe_analysis(data, config, find_device(config.device)), "models": reports}
    write_json(out / "attention.json", report)
    plot_attention({model["name"]: model for model in reports}, out / "attention.png")
    return report


def measure_attention(analyzed: AnalyzedModel) -> dict[str, Any]:
    """A model's shares of attention as JSON values, means over images, heads and queries (teacher-forced).

    `attention`: for each block of `blocks` (counted from 1) and each scale of the queries, the shares of all scales of
    the keys, which sum to 1. `own_share`, and the same per block, is the mean share of a token's own scale, over the
    tokens of all scales but the first, which sees no other; `uniform_share` is what it would be if every visible token
    got the same; `products_share` is the share of the products of queries and keys that are within a scale. Raises
    UserError for a model without attention to earlier scales.
    """
    layers, pyramid = _find_layers(analyzed), analyzed.model.pyramid
    sums = {block: _Shares(pyramid) for block in layers}
    with ExitStack() as stack:
        for block, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(sums[block]).remove)
        for _ in analyzed.run_batches():
            pass
    sums_SKK = torch.stack([shares.sum_KK for shares in sums.values()])
    shares_SKK = sums_SKK / sums_SKK.sum(dim=-1, keepdim=True)
    queries_K = torch.tensor(pyramid.counts, dtype=sums_SKK.dtype)
    visible_K, weight_K = queries_K.cumsum(0), queries_K / queries_K[1:].sum()
    weight_K[0] = 0
    own_SK, uniform_K = shares_SKK.diagonal(dim1=1, dim2=2), queries_K / visible_K
    own_S = own_SK @ weight_K
    return {
        "name": analyzed.name,
        "images": len(analyzed.rows),
        "scales": analyzed.scales,
        "blocks": list(layers),
        "own_share": float(own_S.mean()),
        "uniform_share": float(uniform_K @ weight_K),
        "products_share": float((queries_K[1:] ** 2).sum() / (queries_K * visible_K)[1:].sum()),
        "own_share_per_scale": own_SK.mean(dim=0).tolist(),
        "uniform_share_per_scale": uniform_K.tolist(),
        "own_share_per_block": own_S.tolist(),
        "attention": shares_SKK.tolist(),
    }


def _find_layers(analyzed: AnalyzedModel) -> dict[int, Attention]:
    """The attention to all scales of each block that has it, by the block's number from 1; UserError if none has."""
    config, name = analyzed.model.config, analyzed.name
    if len(analyzed.model.pyramid) == 1:
        raise UserError(f"{name} has one scale: there is no earlier one that could get attention")
    layers = {
        block.index + 1: mixer
        for block in analyzed.model.blocks
        for kind, mixer in zip(config.block_mixers(block.index), block.mixers, strict=True)
        if kind == "attention" and isinstance(mixer, Attention)
    }
    if not layers:
        mixers = " ".join(config.mixers)
        raise UserError(
            f"{name} has the mixers {mixers}: no attention sees earlier scales, so a token's own scale gets all of it; "
            "give a model with the mixer attention"
        )
    return layers


class _Shares:
    """A hook before an attention layer that adds up softmax values: rows are scales of queries, columns of keys."""

    def __init__(self, pyramid: Pyramid):
        self.sum_KK = widen(torch.zeros(len(pyramid), len(pyramid)))

    def __call__(self, layer: Attention, given: tuple[Tensor, ScaleContext, Any]) -> None:
        x_BND, context, _ = given
        self.sum_KK += sum_attention(layer, x_BND, context).cpu()


def sum_attention(layer: Attention, x_BND: Tensor, context: ScaleContext) -> Tensor:
    """The layer's softmax values for all scales of teacher-forced inputs, summed over images, heads, queries and keys
    of a pair of scales: (K, K), float64 where the device has it."""
    qkv_BN3Hd = layer.project(x_BND).unflatten(-1, (3, layer.heads, layer.head_width))
    q_BHNd, k_BHNd, _ = layer.split_heads(qkv_BN3Hd, context)
    pyramid = context.pyramid
    sum_KK = widen(x_BND.new_zeros(len(pyramid), len(pyramid), dtype=torch.float32))
    for q_HNd, k_HNd in zip(q_BHNd.float() * layer.softmax_scale, k_BHNd.float(), strict=True):  # one image: memory
        for k, (start, end) in enumerate(pyramid.spans):
            weights_HNM = (q_HNd[:, start:end] @ k_HNd[:, :end].transpose(1, 2)).softmax(dim=-1)
            by_scale = widen(weights_HNM.sum(dim=(0, 1))).split(pyramid.counts[: k + 1])
            sum_KK[k, : k + 1] += torch.stack([part.sum() for part in by_scale])
    return sum_KK
