"""One transformer block: mixers, then a feed-forward, each behind adaLN modulation.

Letters: B batch, N tokens at hand, D width, S layers of the block (VAR: attention, feed-forward; M-VAR: attention
within the scale, Mamba-2, feed-forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.registry import FEED_FORWARDS, MIXERS
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.condition import EmbeddedCondition
from nextscale.transformer.context import Mixer, ScaleContext
from nextscale.transformer.feed_forward import FeedForward, Record


class AdaLayerNorm(nn.Module):
    """LN(x) (1 + scale) + shift, with a LayerNorm that has no weights of its own."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
        return torch.addcmul(shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=self.eps), 1 + scale_B1D)


class GatedResidual(nn.Module):
    """x + gamma y, the residual and a layer's output."""

    def forward(self, x_BND: Tensor, y_BND: Tensor, gamma_B1D: Tensor) -> Tensor:
        return torch.addcmul(x_BND, y_BND, gamma_B1D)


class AdaLN(nn.Module):
    """From the condition to gamma, scale and shift of every layer of a block, (B, 3, S, D).

    Either a projection of the block's own, or (`shared_adaln`) an offset added to one projection that all blocks use.
    """

    def __init__(self, config: TransformerConfig, layers: int):
        super().__init__()
        self.shape = (-1, 3, layers, config.width)
        width = 3 * layers * config.width
        self.linear = None if config.shared_adaln else nn.Linear(config.width, width)
        offset = torch.empty(1, 1, 3 * layers, config.width)
        self.offset = nn.Parameter(offset) if config.shared_adaln else None

    @property
    def rows(self) -> Tensor:
        """The block's own parameters: gammas first, then scales, then shifts, along the first dimension."""
        if self.linear is not None:
            return self.linear.weight
        assert self.offset is not None, "adaLN has either a projection or an offset"
        return self.offset[0, 0]

    def forward(self, active_BD: Tensor, shared_BW: Tensor | None) -> Tensor:
        """`active_BD` is SiLU(condition); `shared_BW` is the shared projection of it, where there is one."""
        if self.linear is not None:
            return self.linear(active_BD).view(self.shape)
        assert self.offset is not None, "adaLN has either a projection or an offset"
        assert shared_BW is not None, "shared adaLN needs the shared projection"
        return self.offset.view(self.shape) + shared_BW.view(self.shape)


class Block(nn.Module):
    """x += gamma_s * layer_s(LN(x) (1 + scale_s) + shift_s) for every layer s: the mixers, then the feed-forward."""

    mixers: Sequence[Mixer]
    ffn: FeedForward

    def __init__(self, config: TransformerConfig, index: int, scales: int):
        super().__init__()
        self.index = index
        self.norm, self.residual = AdaLayerNorm(config.norm_eps), GatedResidual()
        self.mixers = nn.ModuleList(  # type: ignore[assignment]
            MIXERS.get(name)(config) for name in config.block_mixers(index)
        )
        self.ffn = FEED_FORWARDS.get(config.resolved_feed_forward)(config, scales, index)
        self.adaln = AdaLN(config, len(self.layers))

    @property
    def layers(self) -> tuple[Mixer | FeedForward, ...]:
        """The S layers in the order they run."""
        return *self.mixers, self.ffn

    def new_states(self, batch: int, length: int) -> list[Any]:
        """A new state for each mixer, None for those that keep none."""
        return [mixer.new_state(batch, length) for mixer in self.mixers]

    def read_condition(self, given: EmbeddedCondition) -> list[Any] | None:
        """The states of the mixers that read the condition, None for the others; None where no mixer does."""
        if not any(mixer.reads_condition for mixer in self.mixers):
            return None
        return [mixer.read_condition(given) if mixer.reads_condition else None for mixer in self.mixers]

    def forward(
        self,
        x_BND: Tensor,
        adaln_B3SD: Tensor,
        context: ScaleContext,
        states: list[Any] | None = None,
        previous: Record | None = None,
    ) -> tuple[Tensor, Record | None]:
        """The block's output and its feed-forward's record.

        `states`: the mixers' states in sampling; in training those of `read_condition`, or None. `previous`: the record
        of the block before.
        """
        record = None
        for s in range(len(self.layers)):
            gamma, scale, shift = adaln_B3SD[:, :, s].unsqueeze(2).unbind(1)  # (B, 1, D) each
            y_BND, record = self.run_layer(s, x_BND, scale, shift, context, states, previous)
            x_BND = self.residual(x_BND, y_BND, gamma)
        return x_BND, record

    def run_layer(
        self, s: int, x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, context: ScaleContext,
        states: list[Any] | None, previous: Record | None,
    ) -> tuple[Tensor, Record | None]:  # fmt: skip
        """layer_s(LN(x) (1 + scale) + shift), and the record if it is the feed-forward."""
        y_BND = self.norm(x_BND, scale_B1D, shift_B1D)
        if s < len(self.mixers):
            return self.mixers[s](y_BND, context, states[s] if states else None), None
        return cast(tuple[Tensor, Record | None], self.ffn(y_BND, context, previous))
