"""Whether the routers of dynamic experts belong to the FFNs that they stand beside.

A router predicts the norms of the experts of one FFN. When that FFN is trained further, its router no longer fits. The
config therefore holds a fingerprint of the FFNs that the routers were trained for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nextscale.checkpoints import Checkpoint
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import compute_fingerprint
from nextscale.config.transformer import TransformerConfig

_SAMPLED_ROWS = 61
_PROJECTIONS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def compute_router_fingerprint(weights: Mapping[str, Tensor], model: TransformerConfig) -> str:
    """Fingerprint, 16 hex digits, of the FFNs that routers are trained for: all biases and every 61st row of weights.

    Values are rounded to bfloat16 first, so a checkpoint stored in 16 bits has the same fingerprint. A training step
    changes it, and so does another order of the hidden units.
    """
    dynamic = model.dynamic
    settings = f"{dynamic.experts} {dynamic.activation} {dynamic.late_ffn}"
    return compute_fingerprint(dict(sample_ffn_rows(weights, model)), settings)[:16]


def sample_ffn_rows(weights: Mapping[str, Tensor], model: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and bfloat16 values of the biases and of a sample of the rows of all FFNs that are divided into experts."""
    late = ".late" if model.dynamic.late_ffn else ""
    for place in (f"blocks.{block}.ffn{late}" for block in range(model.depth)):
        for name in _PROJECTIONS:
            tensor = weights[f"{place}.{name}"].detach()
            rows = tensor[::_SAMPLED_ROWS] if tensor.ndim == 2 else tensor
            yield f"{place}.{name}", rows.to(torch.bfloat16)


def check_router_fingerprint(source: object, checkpoint: Checkpoint) -> None:
    """Raise UserError when the routers of a checkpoint were trained for other FFNs than it holds."""
    model = checkpoint.config.transformer
    if model is None or not model.dynamic.router_fingerprint:
        return
    if compute_router_fingerprint(checkpoint.transformer, model) != model.dynamic.router_fingerprint:
        raise UserError(
            f"{source}: its routers were trained for another checkpoint, its FFNs have changed since; train them anew "
            "with `nextscale sparsify DIR --stages routers thresholds`"
        )
