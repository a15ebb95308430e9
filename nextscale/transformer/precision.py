"""Computing in float32 whatever the rest of the model computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def disable_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on x's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever dtype its weights and inputs have. Call it without autocast."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias)
