"""Feed-forward layers: their interface, what they report of a pass, and the dense layer of VAR.

Letters: B batch, N tokens at hand, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext, count_matrix_weights

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.records import (
        Activity,
        ExpertSelection,
        Norms,
        Sparsity,
        UnitContribution,
    )
    from nextscale.transformer.feed_forward.routers import Routing


@dataclass(frozen=True)
class Record:
    """What a feed-forward layer reports of one pass. A field is None where it does not apply."""

    routing: Routing | None = None
    """Mixture of experts: the router's decision."""
    selections: tuple[ExpertSelection, ...] = ()
    """Dynamic experts: which worked on each token, one group of tokens after the other."""
    sparsity: Sparsity | None = None
    """Dynamic experts: how sparse the hidden units were."""
    norms: Norms | None = None
    """Dynamic experts: norms of the experts' outputs, predicted and true."""
    contribution: UnitContribution | None = None
    """Dynamic experts: how much each hidden unit contributed."""

    @property
    def activity(self) -> Activity | None:
        """Dynamic experts: how many hidden units worked on each token."""
        if not self.selections:
            return None
        from nextscale.transformer.feed_forward.records import count_activity

        return count_activity(self.selections)


def collect(records: Sequence[Record | None], field: str) -> list[Any]:
    """The values of a field (or `activity`) of all records that have it, block by block."""
    values = (getattr(record, field) for record in records if record is not None)
    return [value for value in values if value is not None]


class FeedForward(nn.Module, ABC):
    """The layer of a block that works on each token by itself. Subclass it for one of your own, and register it:

    @FEED_FORWARDS.register("my-ffn")       # from nextscale.common.registry import FEED_FORWARDS
    class MyFeedForward(FeedForward): ...
    """

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        """`scales`: number of scales of the pyramid. `block`: index of the block, from 0."""
        super().__init__()

    @property
    def output_layers(self) -> list[Any]:
        """The last projections, which write to the residual stream; initialisation scales them by the depth."""
        return []

    @abstractmethod
    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Record | None) -> tuple[Tensor, Record | None]:
        """The layer's output (B, N, D) and its record. `previous`: the record of the block before."""

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        """Multiply-adds for `tokens` tokens of one scale in the block of this index.

        Override it unless the layer's weight matrices, each applied once to each token, are all of its arithmetic.
        """
        return tokens * count_matrix_weights(cls, config, scales, block)

    @classmethod
    def count_inactive_parameters(cls, config: TransformerConfig) -> int:
        """Parameters of one block that do not work on a token, on average."""
        return 0


class DenseFeedForward(FeedForward):
    """D to ffn_width to D with tanh-GELU."""

    def __init__(self, config: TransformerConfig, scales: int = 0, block: int = 0):
        super().__init__(config, scales, block)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    @property
    def output_layers(self) -> list[Any]:
        return [self.fc2]

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Any = None) -> tuple[Tensor, None]:
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh")), None

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        return tokens * 2 * config.width * config.ffn_width
