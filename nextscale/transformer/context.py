"""What a layer receives besides its input, and the interface of mixers. No module keeps the state of a run.

Letters: B batch, L tokens of all scales, N tokens at hand, D width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid, match_scales

if TYPE_CHECKING:
    from nextscale.transformer.condition import EmbeddedCondition
    from nextscale.transformer.feed_forward.thresholds import Thresholds


@dataclass(frozen=True)
class ScaleContext:
    """Where in the pyramid the tokens at hand are."""

    pyramid: Pyramid
    span: tuple[int, int]
    """Positions of the tokens at hand in the packed sequence."""
    teacher_forced: bool = False
    """Whether the tokens at hand are those of all scales from the first one on; otherwise they are of one scale, and
    may see one another and all cached ones."""
    k: int = 0
    """The finest scale at hand."""
    thresholds: Thresholds | None = None
    """Thresholds of dynamic experts; None: all experts work."""
    tables: Pyramid | None = None
    """The pyramid whose scales have embeddings, where the model runs at another one."""
    router_scales_KD: Tensor | None = None
    """The scale embeddings that the routers of all layers share; None where each has its own, or none."""

    def index_scales(self, device: torch.device) -> Tensor:
        """Which row of a table of scales each token at hand has, int64: (N,), or (1,) when all are of one scale."""
        start, end = self.span
        if not self.teacher_forced:  # with token pruning the span counts computed tokens
            start = self.pyramid.spans[self.k][0]
            end = start + 1
        return index_rows(self.pyramid, self.tables, device)[start:end]

    def mask(self, device: torch.device) -> Tensor | None:
        """True where a token may look, (N, N); None when it may see all."""
        return block_causal_mask(self.pyramid, device, self.span[1]) if self.teacher_forced else None

    def list_spans(self, count: int) -> list[tuple[int, int]]:
        """The `count` tokens at hand, scale by scale."""
        if not self.teacher_forced:
            return [(0, count)]
        return [span for span in self.pyramid.spans if span[1] <= count]


@lru_cache(maxsize=8)
def index_scales(pyramid: Pyramid, device: torch.device) -> Tensor:
    """Which scale each position belongs to, int64 (L,). Copied to the device once: a captured graph may not wait."""
    with torch.inference_mode(False):  # it may be used in training later
        return torch.tensor(pyramid.scale_of_L, device=device)


def index_rows(pyramid: Pyramid, tables: Pyramid | None, device: torch.device) -> Tensor:
    """As `index_scales`, of the scales of `tables` that are at the same relative place; None: of the pyramid."""
    return index_scales(pyramid, device) if tables is None else _index_others(pyramid, tables, device)


@lru_cache(maxsize=32)
def _index_others(pyramid: Pyramid, tables: Pyramid, device: torch.device) -> Tensor:
    rows = match_scales(tables, pyramid)
    with torch.inference_mode(False):
        return torch.tensor([rows[k] for k in pyramid.scale_of_L], device=device)


@lru_cache(maxsize=8)
def block_causal_mask(pyramid: Pyramid, device: torch.device, length: int | None = None) -> Tensor:
    """(L, L), True where the row's token may see the column's: its own scale and all coarser ones; or of the first
    `length` tokens alone."""
    scale_L = index_scales(pyramid, device)[:length]
    with torch.inference_mode(False):
        return scale_L[:, None] >= scale_L[None, :]


class Mixer(nn.Module, ABC):
    """A layer of a block that mixes tokens. Subclass it for a mixer of your own, and register it under a name:

        @MIXERS.register("my-mixer")            # from nextscale.common.registry import MIXERS
        class MyMixer(Mixer): ...

    A block calls `mixer(x_BND, context, state)` and adds the result to the residual stream. The same call serves
    training (all scales at once, `context.teacher_forced`) and sampling (one scale after another); a mixer must not
    look at finer scales than the token's own.
    """

    reads_condition = False
    """Whether its state, in training too, is what `read_condition` made of the condition, a tuple of tensors."""

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

    def read_condition(self, given: EmbeddedCondition) -> tuple[Tensor, ...]:
        """What all scales use of the condition, computed once for a batch: the batch is the first dimension of each."""
        return ()

    def first_of_state(self, state: Any, count: int) -> Any:
        """A state whose tensors are views of those of the first `count` sequences; None stays None.

        This serves states that are objects whose tensors all have the sequences as their first dimension; override it
        for others.
        """
        if state is None:
            return None
        part = copy.copy(state)
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                object.__setattr__(part, name, value[:count])  # a frozen dataclass refuses setattr
        return part

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
    def count_condition_multiply_adds(cls, config: TransformerConfig) -> int:
        """Multiply-adds of `read_condition`, of one sequence."""
        return 0

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        """Values that are kept for later scales, of one sequence, after `cached` tokens."""
        return 0


def count_matrix_weights(kind: type[nn.Module], *arguments: Any) -> int:
    """Weights of the matrices of `kind(*arguments)`: its multiply-adds for a token if each is applied once."""
    with torch.device("meta"):
        layer = kind(*arguments)
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
