"""The interface of mixers: the layers of a block that exchange information between tokens.

Letters: B batch, N tokens at hand, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext


class Mixer(nn.Module, ABC):
    """A layer of a block that mixes tokens. Subclass it for a mixer of your own, and register it under a name:

        @MIXERS.register("my-mixer")            # from nextscale.common.registry import MIXERS
        class MyMixer(Mixer): ...

    A block calls `mixer(x_BND, context, state)` and adds the result to the residual stream. The same call serves
    training (all scales at once, `context.teacher_forced`) and sampling (one scale after another); a mixer must not
    look at finer scales than the token's own.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()

    @property
    def output_layers(self) -> list[nn.Linear]:
        """The last projections, which write to the residual stream; initialisation scales them by the depth."""
        return []

    def new_state(self, batch: int, length: int) -> Any:
        """What is kept from scale to scale while sampling `batch` sequences; None if nothing is.

        `length`: tokens of all scales but the last one, which no later scale needs.
        """
        return None

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the parameters that are neither linear layers nor embeddings."""

    @abstractmethod
    def forward(self, x_BND: Tensor, context: ScaleContext, state: Any) -> Tensor:
        """The layer's output (B, N, D). `state` is `new_state`'s, to be updated in place, or None in training."""

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, tokens: int, visible: int) -> int:
        """Multiply-adds for `tokens` tokens of one scale, of which each may look at `visible` tokens.

        Override it unless the layer's weight matrices, each applied once to each token, are all of its arithmetic.
        """
        return tokens * count_matrix_weights(cls, config)

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        """Values that are kept for later scales, of one sequence, after `cached` tokens."""
        return 0


def count_matrix_weights(kind: type[nn.Module], *arguments: Any) -> int:
    """Weights of the matrices of `kind(*arguments)`: its multiply-adds for a token if each is applied once."""
    with torch.device("meta"):
        layer = kind(*arguments)
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
