"""A vector as a condition, such as an image's or a text's embedding. Letters: B batch, E its width, D width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.devices import create_embedding
from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for
from nextscale.config.condition import ConditionConfig
from nextscale.transformer.condition import Condition, EmbeddedCondition, get_field
from nextscale.transformer.conditions.batch import Rows, stack_rows


class VectorCondition(Condition):
    """A vector, normalised and projected; a learned vector stands for "no vector".

    A batch: `vector` float32 (B, E), `given` bool (B,).
    """

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        self.width = config.embedding_width
        self.project = nn.Linear(self.width, width)
        self.none = create_embedding(1, width)

    def forward(self, rows: Rows) -> EmbeddedCondition:
        x_BE = F.layer_norm(rows["vector"], (self.width,))  # encoders differ in the length of their vectors
        vector_BD = self.project(cast_for(self.project, x_BE))
        return EmbeddedCondition(torch.where(rows["given"][:, None], vector_BD, self.none.weight.to(vector_BD.dtype)))

    def parse(self, values: Sequence[Any]) -> Rows:
        """Vectors of E finite numbers, of any library, None meaning "no vector"."""
        vectors = [None if value is None else self._parse_vector(value) for value in values]
        return stack_rows("vector", vectors, (self.width,), self.none.weight.device)

    def _parse_vector(self, value: Any) -> Tensor:
        try:
            vector = torch.as_tensor(value).detach().cpu().float()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"a vector is a list of {self.width} numbers; got {value!r:.60}") from None
        if vector.shape != (self.width,) or not vector.isfinite().all():
            raise UserError(f"a vector of this model has {self.width} finite numbers; got {tuple(vector.shape)}")
        return vector

    def from_batch(self, batch: Mapping[str, Any]) -> Rows:
        """Vectors (B, E) of any floating-point type."""
        vector_BE = get_field(batch, self.batch_field).float()
        if vector_BE.ndim != 2 or vector_BE.shape[1] != self.width:
            raise UserError(f"the model reads vectors (B, {self.width}); the data have {tuple(vector_BE.shape)}")
        return Rows({"vector": vector_BE, "given": torch.ones_like(vector_BE[:, 0], dtype=torch.bool)})

    def nothing(self, count: int) -> Rows:
        return self.parse([None] * count)

    @classmethod
    def count_multiply_adds(cls, config: ConditionConfig, width: int) -> int:
        return config.embedding_width * width
