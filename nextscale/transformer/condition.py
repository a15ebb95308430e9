"""What an image is conditioned on. The transformer knows only the vector, and perhaps the sequence, that a condition
gives.

A condition turns the caller's values (class labels) or a batch of training into an `EmbeddedCondition`, defines "no
condition" for guidance and condition dropout, and refuses values that it does not know. Letters: B batch, T tokens of
the sequence, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.devices import copy_to, create_embedding
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig


@dataclass(frozen=True)
class EmbeddedCondition:
    """What the transformer uses of a condition."""

    vector_BD: Tensor
    """For adaLN and the start token."""
    sequence_BTD: Tensor | None = None
    """For cross-attention. T is the same in every batch, so that an image does not depend on the others."""
    mask_BT: Tensor | None = None
    """bool, True where the sequence has content: at one place of each row, or more."""


class Condition(nn.Module, ABC):
    """The interface of conditions. Subclass it for one of your own, and register it under a name:

        @CONDITIONS.register("my-condition")    # from nextscale.common.registry import CONDITIONS
        class MyCondition(Condition): ...

    A batch of values is a tensor whose first dimension is the batch, or something else with a length that can be
    sliced (`nextscale.transformer.conditions.batch.Rows` holds several tensors).
    """

    def __init__(self, config: ConditionConfig, width: int):
        """`width`: the transformer's width D."""
        super().__init__()
        self.batch_field = config.batch_field

    @abstractmethod
    def forward(self, values: Any) -> EmbeddedCondition:
        """What the transformer uses of a batch of values."""

    @abstractmethod
    def parse(self, values: Any) -> Any:
        """A caller's values as a batch on the model's device; UserError when one is out of range."""

    @abstractmethod
    def nothing(self, count: int) -> Any:
        """A batch of `count` values without any condition, on the model's device."""

    def from_batch(self, batch: Mapping[str, Any]) -> Any:
        """The values of a training batch. UserError where it has none."""
        return get_field(batch, self.batch_field)

    def add_unconditional(self, values: Any) -> Any:
        """The batch followed by as many values without any condition: the two halves of guidance."""
        return self.join(values, self.nothing(len(values)))

    def join(self, first: Any, second: Any) -> Any:
        """The values of one batch and then those of another one."""
        from nextscale.transformer.conditions.batch import join_rows

        return join_rows(first, second)

    def replace_parts(self, values: Any, names: Sequence[str], others: Any) -> Any:
        """`values` with the values that these parts have in `others`. UserError for a part that there is not."""
        raise UserError("cfg_parts is for a combined condition, and this model's has no parts: use cfg")

    def drop(self, drop_B: Tensor, values: Any) -> Any:
        """`values`, without condition where `drop_B` is True."""
        from nextscale.transformer.conditions.batch import choose_rows

        return choose_rows(drop_B, self.nothing(len(values)), values)

    def draw_drop(self, count: int, rate: float, rng: torch.Generator) -> Tensor:
        """Which of `count` training examples lose their condition, for `drop`: bool, the first dimension is B."""
        return torch.rand(count, generator=rng) < rate

    @classmethod
    def count_tokens(cls, config: ConditionConfig) -> int:
        """The length T of the sequence; 0 if there is none."""
        return 0

    @classmethod
    def count_multiply_adds(cls, config: ConditionConfig, width: int) -> int:
        """Multiply-adds of embedding one value."""
        return 0


class ClassCondition(Condition):
    """A learned vector per class; the row after the last one means "no label"."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        self.num_classes = config.num_classes
        self.embedding = create_embedding(config.num_classes + 1, width)

    def forward(self, label_B: Tensor) -> EmbeddedCondition:
        return EmbeddedCondition(self.embedding(label_B))

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

    def nothing(self, count: int) -> Tensor:
        return torch.full((count,), self.num_classes, device=self.embedding.weight.device)

    def add_unconditional(self, values: Tensor) -> Tensor:
        return torch.cat([values, torch.full_like(values, self.num_classes)])

    def drop(self, drop_B: Tensor, values: Tensor) -> Tensor:
        return torch.where(drop_B.to(values.device), self.num_classes, values)


def get_field(batch: Mapping[str, Any], name: str) -> Any:
    """A field of a training batch; UserError where the data have none of this name."""
    if name not in batch:
        raise UserError(f"the condition needs '{name}' of every example, and the data have none")
    return batch[name]
