"""What the transformer's linear layers and the decoder's convolutions in 8 bits share."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255
"""The largest integer of an input; the smallest is 0."""
NO_GRADIENTS = "layers in int8 give no gradients and cannot be trained; train the model that they were made from"


def quantise_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): int8 in -127 to 127 of the weight's shape and float32 without its last dimension, weight = scale q to
    within half a scale."""
    weight = weight_OI.detach().float()
    scale = weight.abs().amax(dim=-1) / 127
    q = (weight / torch.where(scale == 0, 1, scale).unsqueeze(-1)).round()
    return q.to(torch.int8), scale
