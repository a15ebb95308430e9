"""The VAR transformer: embeds what each scale may see, runs the blocks, predicts a token for every position.

Letters: B batch, N tokens at hand, L tokens of all scales, D width, C code width, V codes, S layers of a block.
`forward` runs all scales at once under the block-causal mask; `step` runs one scale against a cache. Both go
through `_run`, so they are one function in two portions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.ops import Embedding, Linear
from nextscale.common.errors import UserError
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.pruning import Pruning
from nextscale.transformer.block import Block, modulate
from nextscale.transformer.condition import ClassCondition
from nextscale.transformer.context import ScaleContext, scale_indices
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.projector import Projector

Cache = list[list[Any]]


@dataclass(frozen=True)
class Conditioning:
    """All that the condition contributes, computed once per batch: it is the same at every scale."""

    cond_BD: Tensor
    blocks_B3SD: list[Tensor]
    """gamma, scale and shift of every layer, per block."""
    head_B2D: Tensor
    """scale and shift before the head."""


@dataclass(frozen=True)
class Output:
    """What a pass through the transformer gives."""

    logits_BNV: Tensor
    """float32."""
    records: list[list[Any]]
    """What each layer of each block recorded (routing, in mixtures of experts); None for dense layers."""
    projected_BNE: Tensor | None = None
    """The alignment head's output, of the first scales, where it was asked for."""
    hidden_BND: Tensor | None = None
    """The output of the block that was asked for."""


class VAR(nn.Module):
    """Next-scale prediction transformer (VAR, arXiv 2404.02905, Eq. 4 of MEPA)."""

    blocks: Sequence[Block]

    def __init__(self, config: TransformerConfig, pyramid: Pyramid, vocab_size: int, code_width: int):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        D = config.width
        self.condition = ClassCondition(config.condition, D)
        self.word_embed = Linear(code_width, D)
        self.pos_start = nn.Parameter(torch.empty(1, pyramid.counts[0], D))
        self.pos_embed = nn.Parameter(torch.empty(1, pyramid.length, D))
        self.level_embed = Embedding(len(pyramid), D)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(config, i, len(pyramid)) for i in range(config.depth)
        )
        self.shared_adaln = Linear(D, 3 * len(self.blocks[0].layers) * D) if config.shared_adaln else None
        self.head_adaln = Linear(D, 2 * D)
        self.head = Linear(D, vocab_size)
        self.projector = Projector(config) if config.alignment.width else None

    def conditioning(self, values: Any) -> Conditioning:
        """Everything derived from a batch of condition values (labels)."""
        cond_BD = self.condition(values)
        active_BD = F.silu(cond_BD)
        shared_BW = self.shared_adaln(active_BD) if self.shared_adaln is not None else None
        return Conditioning(
            cond_BD,
            [block.adaln(active_BD, shared_BW) for block in self.blocks],
            self.head_adaln(active_BD).view(len(cond_BD), 2, -1),
        )

    def forward(
        self, values: Any, x_BLC: Tensor, branch_keep: Tensor | None = None, guided: int = 0, hidden: int = 0,
        thresholds: Thresholds | None = None,
    ) -> Output:  # fmt: skip
        """Logits (B, L, V) of all scales at once.

        `values`: the condition (labels, int64 (B,)). `x_BLC`: the tokenizer's teacher inputs of scales 1 to K-1,
        (B, L - N of scale 0, C). `branch_keep`: stochastic depth, (blocks, S, B), 0 or 1 / keep probability.
        `guided`: how many scales the alignment head projects, for semantic guidance. `hidden`: the block, counted from
        1, whose output is wanted too, to be looked at. `thresholds`: of dynamic experts.
        """
        expected = self.pyramid.length - self.pyramid.counts[0]
        if x_BLC.ndim != 3 or x_BLC.shape[1] != expected:
            raise UserError(f"teacher inputs must be (B, {expected}, {self.word_embed.in_features}); got {x_BLC.shape}")
        conditioning = self.conditioning(values)
        x_BND = self.start(conditioning)
        if expected:
            x_BND = torch.cat([x_BND, self._embed(x_BLC, (self.pyramid.counts[0], self.pyramid.length))], dim=1)
        context = ScaleContext(
            self.pyramid, (0, self.pyramid.length), True, k=len(self.pyramid) - 1, thresholds=thresholds
        )
        return self._run(x_BND, conditioning, context, None, branch_keep, guided=guided, hidden=hidden)

    def step(
        self, conditioning: Conditioning, x_BNC: Tensor | None, k: int, cache: Cache, pruning: Pruning | None = None,
        thresholds: Thresholds | None = None,
    ) -> Output:  # fmt: skip
        """Logits (B, N, V) of scale k. `x_BNC` is the tokenizer's next input, None at scale 0, which starts anew."""
        span = self.pyramid.spans[k]
        x_BND = self.start(conditioning) if k == 0 or x_BNC is None else self._embed(x_BNC, span)
        context = ScaleContext(self.pyramid, span, k=k, pruning=pruning, thresholds=thresholds)
        return self._run(x_BND, conditioning, context, cache)

    def catch_up(
        self, conditioning: Conditioning, x_BLC: Tensor, k: int, cache: Cache, thresholds: Thresholds | None = None
    ) -> Output:
        """As `step` for scale k, by a model that has not seen the scales before: all of them in one pass.

        `x_BLC`: the tokenizer's inputs of scales 1 to k. Fills the cache; later scales go on by `step`.
        """
        first, (start, end) = self.pyramid.counts[0], self.pyramid.spans[k]
        x_BND = torch.cat([self.start(conditioning), self._embed(x_BLC, (first, end))], dim=1)
        context = ScaleContext(self.pyramid, (0, end), True, k=k, thresholds=thresholds)
        return self._run(x_BND, conditioning, context, cache, wanted=start)

    def new_cache(self, batch: int) -> Cache:
        """State of every layer of every block for `batch` sequences, allocated once."""
        length = self.pyramid.spans[-1][0]  # nothing looks at the last scale but itself
        return [block.new_states(batch, length) for block in self.blocks]

    def start(self, conditioning: Conditioning) -> Tensor:
        """Embedding of scale 0 (B, N, D): the condition itself, plus positions."""
        start, end = self.pyramid.spans[0]
        return conditioning.cond_BD.unsqueeze(1) + self.pos_start + self._place((start, end))

    def _embed(self, x_BNC: Tensor, span: tuple[int, int]) -> Tensor:
        return self.word_embed(x_BNC.to(self.word_embed.weight.dtype)) + self._place(span)

    def _place(self, span: tuple[int, int]) -> Tensor:
        """Level and position embeddings of a span (1, N, D)."""
        start, end = span
        scales_L = scale_indices(self.pyramid, self.pos_embed.device)
        return self.level_embed(scales_L[start:end]) + self.pos_embed[:, start:end]

    def _run(
        self,
        x_BND: Tensor,
        conditioning: Conditioning,
        context: ScaleContext,
        cache: Cache | None,
        branch_keep: Tensor | None = None,
        wanted: int = 0,
        guided: int = 0,
        hidden: int = 0,
    ) -> Output:
        """Through the blocks to logits, of the tokens from `wanted` on."""
        projected_BNE = hidden_BND = None
        records: list[list[Any]] = []
        for i, block in enumerate(self.blocks):
            adaln_B3SD = conditioning.blocks_B3SD[i]
            if branch_keep is not None:  # dropping a branch is a gamma of zero
                keep_SB = branch_keep[i, : adaln_B3SD.shape[2]]
                gamma_B1SD = adaln_B3SD[:, :1] * keep_SB.T[:, None, :, None]
                adaln_B3SD = torch.cat([gamma_B1SD, adaln_B3SD[:, 1:]], dim=1)
            x_BND, record = block(
                x_BND, adaln_B3SD, context, cache[i] if cache else None, records[-1] if records else None
            )
            records.append(record)
            if i + 1 == hidden:
                hidden_BND = x_BND
            if guided and self.projector is not None and i + 1 == self.config.aligned_block:
                projected_BNE = self.projector(x_BND[:, : self.pyramid.spans[guided - 1][1]])
        scale, shift = conditioning.head_B2D.unsqueeze(2).unbind(1)
        x_BND = modulate(x_BND[:, wanted:], scale, shift, self.config.norm_eps)
        return Output(self.head(x_BND).float(), records, projected_BNE, hidden_BND)
