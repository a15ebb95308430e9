"""Several conditions at once, such as a caption and edges, or several attributes. Letters: B batch, P parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.registry import CONDITIONS
from nextscale.config.condition import ConditionConfig
from nextscale.transformer.condition import Condition, EmbeddedCondition
from nextscale.transformer.conditions.batch import Rows


class CombinedCondition(Condition):
    """The sum of the parts' vectors, and their sequences one after another. A batch: that of each part by its name."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        self.parts = nn.ModuleDict(
            {name: CONDITIONS.get(part.kind)(part, width) for name, part in config.parts.items()}
        )

    def forward(self, values: Rows) -> EmbeddedCondition:
        given = [part(values[name]) for name, part in self.parts.items()]
        vector_BD = given[0].vector_BD
        for other in given[1:]:
            vector_BD = vector_BD + other.vector_BD
        sequences = [g.sequence_BTD for g in given if g.sequence_BTD is not None]
        masks = [g.mask_BT for g in given if g.mask_BT is not None]
        if not sequences:
            return EmbeddedCondition(vector_BD)
        return EmbeddedCondition(vector_BD, torch.cat(sequences, dim=1), torch.cat(masks, dim=1))

    def parse(self, values: Mapping[str, Any]) -> Rows:
        """Values of the parts by name; a part without any has none. UserError for a part that there is not."""
        self._check_names(values)
        counts = [len(rows[0] if isinstance(rows, tuple) else rows) for rows in values.values()]
        count = max(counts, default=0)
        return self._map(lambda name, part: part.parse(values[name]) if name in values else part.nothing(count))

    def from_batch(self, batch: Mapping[str, Any]) -> Rows:
        return self._map(lambda name, part: part.from_batch(batch))

    def nothing(self, count: int) -> Rows:
        return self._map(lambda name, part: part.nothing(count))

    def replace_parts(self, values: Rows, names: Sequence[str], others: Rows) -> Rows:
        self._check_names(names)
        return Rows({name: (others if name in names else values)[name] for name in self.parts})

    def draw_drop(self, count: int, rate: float, rng: torch.Generator) -> Tensor:
        """bool (B, P): each part is dropped at the rate, and all together at the rate (as InstructPix2Pix)."""
        drop = torch.rand(count, len(self.parts) + 1, generator=rng) < rate
        return drop[:, 1:] | drop[:, :1]

    def drop(self, drop_B: Tensor, values: Rows) -> Rows:
        """`values` without the parts where `drop_B`, (B, P), is True; (B,): without all of them."""
        drop_PB = drop_B.T if drop_B.ndim == 2 else drop_B.expand(len(self.parts), -1)
        dropped = zip(self.parts.items(), drop_PB, strict=True)
        return Rows({name: part.drop(drop, values[name]) for (name, part), drop in dropped})  # type: ignore[operator]

    def _map(self, get: Any) -> Rows:
        return Rows({name: get(name, part) for name, part in self.parts.items()})

    def _check_names(self, names: Any) -> None:
        unknown = [name for name in names if name not in self.parts]
        if unknown:
            raise UserError(f"the condition has no part '{unknown[0]}'; it has {', '.join(self.parts)}")

    @classmethod
    def count_tokens(cls, config: ConditionConfig) -> int:
        return sum(CONDITIONS.get(part.kind).count_tokens(part) for part in config.parts.values())

    @classmethod
    def count_multiply_adds(cls, config: ConditionConfig, width: int) -> int:
        return sum(CONDITIONS.get(part.kind).count_multiply_adds(part, width) for part in config.parts.values())
