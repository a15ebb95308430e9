"""Embedding tables."""

from __future__ import annotations

import torch
from torch import nn


def create_embedding(count: int, width: int) -> nn.Embedding:
    """nn.Embedding(count, width). On the meta device no values are drawn, for which torch would load its compiler."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
