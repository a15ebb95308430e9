"""Weights of 16 bits on a CPU that is slow in their type: kept so in memory, and computed in float32."""

from __future__ import annotations

from torch import nn

from nextscale.common.precision import is_computed_in_float32

SMALL = 2**18
"""Values of a weight that is converted once: the weights of models that are so narrow take 1 MiB each at most, and
converting them at each product would take a tenth of a small batch's time."""


def widen_parameters(module: nn.Module) -> None:
    """Convert to float32, in place, what is computed in float32 and not converted at its use.

    Large weights of linear layers, experts and convolutions (`converts_weight`) are converted at each product, some
    values at a time. All others (norms, biases, embeddings, and what your own modules read directly) are small.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            large = parameter.numel() > SMALL
            converted = large and name == "weight" and getattr(child, "converts_weight", False)
            if is_computed_in_float32(parameter) and not converted:
                wide = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
                setattr(child, name, wide)
