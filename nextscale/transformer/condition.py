"""What an image is conditioned on. The transformer knows only the vector that a condition gives.

A condition turns the caller's values (class labels) into `cond_BD`, defines "no condition" for guidance and condition
dropout, and refuses values that it does not know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.devices import copy_to, create_embedding
from nextscale.common.errors import UserError
from nextscale.config.transformer import ConditionConfig


class Condition(nn.Module, ABC):
    """The interface of conditions. Subclass it for one of your own, and register it under a name:

    @CONDITIONS.register("my-condition")    # from nextscale.common.registry import CONDITIONS
    class MyCondition(Condition): ...
    """

    def __init__(self, config: ConditionConfig, width: int):
        """`width`: the transformer's width D."""
        super().__init__()

    @abstractmethod
    def forward(self, values: Any) -> Tensor:
        """`cond_BD` of a batch of values."""

    @abstractmethod
    def parse(self, values: Any) -> Any:
        """A caller's values as a batch; UserError when one is out of range."""

    @abstractmethod
    def add_unconditional(self, values: Any) -> Any:
        """The batch followed by as many values without any condition: the two halves of guidance."""

    @abstractmethod
    def drop(self, drop_B: Tensor, values: Any) -> Any:
        """`values`, without condition where `drop_B` is True."""


class ClassCondition(Condition):
    """A learned vector per class; the row after the last one means "no label"."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        self.num_classes = config.num_classes
        self.embedding = create_embedding(config.num_classes + 1, width)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding(label_B)

    def parse(self, values: Tensor | Sequence[int | None]) -> Tensor:
        """int64 labels (B,) on the model's device from labels in 0 to num_classes - 1, None meaning "no label"."""
        if isinstance(values, Tensor):
            values = values.reshape(-1).tolist()
        for value in values:
            if value is not None and not (isinstance(value, Integral) and 0 <= int(value) < self.num_classes):
                raise UserError(
                    f"label {value} is out of range: this model has {self.num_classes} classes, "
                    f"0 to {self.num_classes - 1}"
                )
        labels = [self.num_classes if value is None else int(value) for value in values]
        return copy_to(torch.tensor(labels, dtype=torch.int64), self.embedding.weight.device)

    def add_unconditional(self, label_B: Tensor) -> Tensor:
        return torch.cat([label_B, torch.full_like(label_B, self.num_classes)])

    def drop(self, drop_B: Tensor, label_B: Tensor) -> Tensor:
        return torch.where(drop_B.to(label_B.device), self.num_classes, label_B)
