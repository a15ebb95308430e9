"""One transformer block: layers (mixers, then a feed-forward) behind adaLN modulation.

Letters: B batch, N tokens at hand, D width, S layers of the block (VAR: attention, feed-forward; M-VAR:
attention within the scale, Mamba-2, feed-forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.blocks import modulated
from nextscale.backends.cpu.ops import Linear
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.attention import Attention, ScaleAttention
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.mixture import MixtureOfExperts
from nextscale.transformer.mamba import Mamba2

MIXERS: dict[str, type[Attention] | type[Mamba2]] = {
    "attention": Attention,
    "scale-attention": ScaleAttention,
    "mamba": Mamba2,
}


class FeedForward(nn.Module):
    """Dense FFN: D to ffn_width to D with tanh-GELU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.fc1 = Linear(config.width, config.ffn_width)
        self.fc2 = Linear(config.ffn_width, config.width)

    @property
    def outputs(self) -> list[Linear]:
        """The last projection, which writes to the residual stream."""
        return [self.fc2]

    def forward(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, None]:
        return self.fc2(self.fc1(x_BND, gelu=True)), None


def feed_forward(
    config: TransformerConfig, scales: int, index: int
) -> FeedForward | DynamicFeedForward | MixtureOfExperts:
    """The feed-forward layer of block `index`, as the config says."""
    if config.experts.router != "none":
        return MixtureOfExperts(config, scales, index)
    return DynamicFeedForward(config, scales) if config.dynamic.on else FeedForward(config)


class AdaLN(nn.Module):
    """From the condition to gamma, scale and shift of every layer of a block, (B, 3, S, D).

    Either a projection of the block's own, or (`shared_adaln`) an offset added to one projection that all blocks use.
    """

    def __init__(self, config: TransformerConfig, layers: int):
        super().__init__()
        self.shape = (-1, 3, layers, config.width)
        width = 3 * layers * config.width
        self.linear = None if config.shared_adaln else Linear(config.width, width)
        offset = torch.empty(1, 1, 3 * layers, config.width)
        self.offset = nn.Parameter(offset) if config.shared_adaln else None

    def rows(self) -> Tensor:
        """The block's own parameters with gammas first, then scales, then shifts, along the first dimension."""
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


def modulate(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, with a LayerNorm that has no weights of its own."""
    y_BND = modulated(x_BND, scale_B1D, shift_B1D, eps)
    return y_BND if y_BND is not None else by_operators(x_BND, scale_B1D, shift_B1D, eps)


def by_operators(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    """`modulate` where there is no kernel for it."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps), 1 + scale_B1D)


class Block(nn.Module):
    """x += gamma_s * layer_s(LN(x) (1 + scale_s) + shift_s) for every layer s: the mixers, then the feed-forward."""

    mixers: Sequence[Attention | Mamba2]

    def __init__(self, config: TransformerConfig, index: int, scales: int):
        super().__init__()
        self.eps, self.index = config.norm_eps, index
        self.mixers = nn.ModuleList(  # type: ignore[assignment]
            MIXERS[name](config) for name in config.block_mixers(index)
        )
        self.ffn = feed_forward(config, scales, index)
        self.adaln = AdaLN(config, len(self.layers))

    @property
    def layers(self) -> tuple[Attention | Mamba2 | FeedForward | DynamicFeedForward | MixtureOfExperts, ...]:
        """The S layers in the order they run."""
        return *self.mixers, self.ffn

    def new_states(self, batch: int, length: int) -> list[Any]:
        """A fresh state for each layer, None for those that keep none."""
        return [mixer.new_state(batch, length) for mixer in self.mixers] + [None]

    def forward(
        self,
        x_BND: Tensor,
        adaln_B3SD: Tensor,
        context: ScaleContext,
        states: list[Any] | None,
        previous: list[Any] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """The block's output and what each layer recorded.

        `states` are the layers' own, None without a cache; `previous` is what the block before recorded.
        """
        records = []
        for s, layer in enumerate(self.layers):
            gamma, scale, shift = adaln_B3SD[:, :, s].unsqueeze(2).unbind(1)  # (B, 1, D) each
            before = previous[-1] if previous and layer is self.ffn else None  # mixers leave no record
            here = replace(context, state=states[s] if states else None, previous=before)
            if context.pruning is None:
                y, record = layer(modulate(x_BND, scale, shift, self.eps), here)
                x_BND = torch.addcmul(x_BND, y, gamma)
            else:
                x_BND, record = self._pruned(x_BND, (gamma, scale, shift), here, s)
            records.append(record)
        return x_BND, records

    def _pruned(
        self, x_BND: Tensor, adaln_3B1D: tuple[Tensor, Tensor, Tensor], context: ScaleContext, s: int
    ) -> tuple[Tensor, Any]:
        """x after layer s, which computes only the tokens that the pruning chooses."""
        gamma, scale, shift = adaln_3B1D
        pruning = context.pruning
        assert pruning is not None, "called only under a pruning"
        here = replace(context, span=pruning.span(context.k, self.index))

        def branch(rows_BnD: Tensor) -> tuple[Tensor, Any]:
            y, record = self.layers[s](modulate(rows_BnD, scale, shift, self.eps), here)
            return y * gamma, record

        added_BND, record = pruning.added(context.k, self.index, s, x_BND, branch)
        return x_BND + added_BND, record
