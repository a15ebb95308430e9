"""The VAR transformer: embeds what each scale may see, runs the blocks, predicts a token for every position.

Letters: B batch, N tokens at hand, L tokens of all scales, D width, C code width, V codes, S layers of a block.
`forward` runs all scales at once under the block-causal mask; `step` runs one scale with a cache of the ones before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextscale.common.devices import create_embedding
from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for
from nextscale.common.registry import CONDITIONS
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.transformer.block import AdaLayerNorm, Block
from nextscale.transformer.condition import Condition
from nextscale.transformer.context import ScaleContext, index_rows
from nextscale.transformer.feed_forward import Record

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.thresholds import Thresholds

Cache = list[list[Any]]
"""For each block the states of its mixers."""


@dataclass(frozen=True)
class Conditioning:
    """All that the condition contributes, computed once per batch: it is the same at every scale."""

    cond_BD: Tensor
    blocks_B3SD: list[Tensor]
    """gamma, scale and shift of every layer, per block."""
    head_B2D: Tensor
    """scale and shift before the head."""
    states: list[list[Any] | None]
    """For each block the states of mixers that read the condition, tuples of tensors; None where no mixer does."""

    def first(self, count: int) -> Conditioning:
        """Of the first `count` sequences: views."""
        blocks = [adaln_B3SD[:count] for adaln_B3SD in self.blocks_B3SD]
        states = [block and [state and tuple(t[:count] for t in state) for state in block] for block in self.states]
        return Conditioning(self.cond_BD[:count], blocks, self.head_B2D[:count], states)

    def join_states(self, block: int, states: list[Any] | None) -> list[Any] | None:
        """The states of a block's mixers: those of the cache, `states`, and those that the condition gives."""
        given = self.states[block]
        if given is None:
            return states
        return [own or kept for own, kept in zip(given, states or [None] * len(given), strict=True)]


@dataclass(frozen=True)
class Output:
    """The result of a pass through the transformer."""

    logits_BNV: Tensor
    """float32."""
    records: list[Record | None]
    """What the feed-forward of each block reports; None for dense ones."""
    projected_BNE: Tensor | None = None
    """The alignment head's output for the first scales, if `aligned_scales` asks for it."""
    hidden_BND: Tensor | None = None
    """The output of the block that `hidden_block` asks for."""


class VAR(nn.Module):
    """Next-scale prediction transformer (VAR, arXiv 2404.02905; MEPA, Eq. 4)."""

    blocks: Sequence[Block]

    def __init__(self, config: TransformerConfig, pyramid: Pyramid, vocab_size: int, code_width: int):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        self.tables = pyramid
        """The pyramid that the embeddings of positions and scales belong to; `at` gives the model at another one."""
        D = config.width
        self.silu = nn.SiLU()
        self.condition: Condition = CONDITIONS.get(config.condition.kind)(config.condition, D)
        self.word_embed = nn.Linear(code_width, D)
        self.pos_start = nn.Parameter(torch.empty(1, pyramid.counts[0], D))
        tabled = config.positions.kind == "table"
        self.pos_embed = nn.Parameter(torch.empty(1, pyramid.length, D)) if tabled else None
        self.level_embed = create_embedding(len(pyramid), D)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(config, i, len(pyramid)) for i in range(config.depth)
        )
        shared = config.experts.has_shared_scales
        self.router_scales = nn.Parameter(torch.empty(len(pyramid), D)) if shared else None
        self.shared_adaln = nn.Linear(D, 3 * len(self.blocks[0].layers) * D) if config.shared_adaln else None
        self.head_norm = AdaLayerNorm(config.norm_eps)
        self.head_adaln = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, vocab_size)
        self.size_embed = None
        if config.positions.size_embedding:
            from nextscale.transformer.positions import SizeEmbedding  # models of one size need none

            self.size_embed = SizeEmbedding(D)
        self.projector = None
        if config.alignment.width:
            from nextscale.transformer.projector import Projector  # training alone uses it

            self.projector = Projector(config)

    def at(self, pyramid: Pyramid) -> VAR:
        """The model at another pyramid: the same weights, with positions resampled or computed for its sides, and for
        each scale the embeddings of the scale at the same relative place. UserError for dynamic experts, whose routers
        and thresholds belong to the scales that they were made for."""
        if pyramid == self.pyramid:
            return self
        if self.config.dynamic.on:
            raise UserError(
                "dynamic experts were made for the scales of their model: use it at its own, or `nextscale adapt` the "
                "dense model and sparsify that"
            )
        from nextscale.common.modules import share_parameters

        view = share_parameters(self)
        view.pyramid = pyramid
        return view

    @property
    def other_tables(self) -> Pyramid | None:
        """The pyramid of the embeddings, where it is not the one that the model runs at."""
        return None if self.tables == self.pyramid else self.tables

    def forward(
        self, values: Any, x_BLC: Tensor, *, drop_path: Tensor | None = None, aligned_scales: int = 0,
        hidden_block: int = 0, thresholds: Thresholds | None = None, scales: int = 0,
    ) -> Output:  # fmt: skip
        """Logits (B, L, V) of all scales at once (teacher forcing), or of the first `scales` alone.

        `values`: the condition, such as labels, int64 (B,). `x_BLC`: the tokenizer's teacher inputs of scales 1 to K-1,
        (B, L - N of scale 0, C), or of those that are computed. `drop_path`: stochastic depth, (blocks, S, B), 0 or 1 /
        keep probability. `aligned_scales`: how many scales the alignment head projects, for semantic guidance.
        `hidden_block`: the block, counted from 1, whose output is returned too. `thresholds`: of dynamic experts.
        """
        last = (scales or len(self.pyramid)) - 1
        (_, length), first = self.pyramid.spans[last], self.pyramid.counts[0]
        expected = length - first
        if x_BLC.ndim != 3 or x_BLC.shape[1] != expected:
            raise UserError(f"teacher inputs must be (B, {expected}, {self.word_embed.in_features}); got {x_BLC.shape}")
        conditioning = self.embed_condition(values)
        x_BND = self.embed_start(conditioning)
        if expected:
            x_BND = torch.cat([x_BND, self.embed_inputs(x_BLC, (first, length))], dim=1)
        context = self.locate((0, length), last, thresholds, teacher_forced=True)
        records: list[Record | None] = []
        projected_BNE = hidden_BND = None
        for i, block in enumerate(self.blocks):
            adaln_B3SD = conditioning.blocks_B3SD[i]
            if drop_path is not None:
                adaln_B3SD = scale_gammas(adaln_B3SD, drop_path[i])
            states = conditioning.join_states(i, None)
            x_BND, record = block(x_BND, adaln_B3SD, context, states, records[-1] if records else None)
            records.append(record)
            if i + 1 == hidden_block:
                hidden_BND = x_BND
            if aligned_scales and self.projector is not None and i + 1 == self.config.aligned_block:
                projected_BNE = self.projector(x_BND[:, : self.pyramid.spans[aligned_scales - 1][1]])
        return Output(self.predict_logits(x_BND, conditioning), records, projected_BNE, hidden_BND)

    def step(
        self, conditioning: Conditioning, x_BNC: Tensor | None, k: int, cache: Cache, *,
        thresholds: Thresholds | None = None,
    ) -> Output:  # fmt: skip
        """Logits (B, N, V) of scale k. `x_BNC` is the tokenizer's next input, None at scale 0."""
        context = self.locate(self.pyramid.spans[k], k, thresholds)
        return self._run_cached(self.embed_scale(conditioning, x_BNC, k), conditioning, context, cache)

    def prefill(
        self, conditioning: Conditioning, x_BLC: Tensor, k: int, cache: Cache, *, thresholds: Thresholds | None = None
    ) -> Output:
        """As `step` for scale k, by a model that has not seen the scales before: all of them in one pass.

        `x_BLC`: the tokenizer's inputs of scales 1 to k. Fills the cache; later scales continue with `step`.
        """
        first, (start, end) = self.pyramid.counts[0], self.pyramid.spans[k]
        x_BND = torch.cat([self.embed_start(conditioning), self.embed_inputs(x_BLC, (first, end))], dim=1)
        context = self.locate((0, end), k, thresholds, teacher_forced=True)
        return self._run_cached(x_BND, conditioning, context, cache, start)

    def locate(
        self, span: tuple[int, int], k: int, thresholds: Thresholds | None, *, teacher_forced: bool = False
    ) -> ScaleContext:
        """What the blocks are told of tokens at these positions; `k` is the finest scale among them."""
        return ScaleContext(self.pyramid, span, teacher_forced, k, thresholds, self.other_tables, self.router_scales)

    def _run_cached(
        self, x_BND: Tensor, conditioning: Conditioning, context: ScaleContext, cache: Cache, first_predicted: int = 0
    ) -> Output:
        """Through the blocks, which read and fill the cache, to the logits of the tokens from `first_predicted` on."""
        records: list[Record | None] = []
        for i, (block, adaln_B3SD) in enumerate(zip(self.blocks, conditioning.blocks_B3SD, strict=True)):
            states = conditioning.join_states(i, cache[i])
            x_BND, record = block(x_BND, adaln_B3SD, context, states, records[-1] if records else None)
            records.append(record)
        return Output(self.predict_logits(x_BND[:, first_predicted:], conditioning), records)

    def new_cache(self, batch: int) -> Cache:
        """The states of all mixers for `batch` sequences, allocated once."""
        length = self.pyramid.spans[-1][0]  # nothing looks at the last scale but itself
        return [block.new_states(batch, length) for block in self.blocks]

    def first_of_cache(self, cache: Cache, count: int) -> Cache:
        """The states of the first `count` sequences: views, so that both caches share what is written."""
        return [
            [m.first_of_state(state, count) for m, state in zip(block.mixers, states, strict=True)]
            for block, states in zip(self.blocks, cache, strict=True)
        ]

    def embed_condition(self, values: Any) -> Conditioning:
        """Everything derived from a batch of condition values, such as labels."""
        given = self.condition(values)
        vector_BD = given.vector_BD
        if self.size_embed is not None:
            vector_BD = vector_BD + self.size_embed(self.pyramid)
        active_BD = self.silu(vector_BD)
        shared_BW = self.shared_adaln(active_BD) if self.shared_adaln is not None else None
        return Conditioning(
            vector_BD,
            [block.adaln(active_BD, shared_BW) for block in self.blocks],
            self.head_adaln(active_BD).view(len(active_BD), 2, -1),
            [block.read_condition(given) for block in self.blocks],
        )

    def embed_scale(self, conditioning: Conditioning, x_BNC: Tensor | None, k: int) -> Tensor:
        """What enters the blocks at scale k, (B, N, D)."""
        if k == 0 or x_BNC is None:
            return self.embed_start(conditioning)
        return self.embed_inputs(x_BNC, self.pyramid.spans[k])

    def embed_start(self, conditioning: Conditioning) -> Tensor:
        """Embedding of scale 0 (B, N, D): the condition itself, plus positions."""
        start_1ND: Tensor = self.pos_start
        if self.tables.sides[0] != self.pyramid.sides[0]:
            from nextscale.transformer.positions import resample_map

            start_1ND = resample_map(start_1ND, self.tables.sides[0], self.pyramid.sides[0])
        return conditioning.cond_BD.unsqueeze(1) + start_1ND + self._embed_positions(self.pyramid.spans[0])

    def embed_inputs(self, x_BNC: Tensor, span: tuple[int, int]) -> Tensor:
        """Embedding of the tokenizer's inputs at the positions of a span, (B, N, D)."""
        return self.word_embed(cast_for(self.word_embed, x_BNC)) + self._embed_positions(span)

    def _embed_positions(self, span: tuple[int, int]) -> Tensor:
        """Level and position embeddings of a span, (1, N, D); with rotary positions those of the level alone."""
        start, end = span
        rows_L = index_rows(self.pyramid, self.other_tables, self.pos_start.device)
        level_1ND: Tensor = self.level_embed(rows_L[start:end])[None]
        table_1LD: Tensor | None = self.pos_embed
        if table_1LD is None:
            return level_1ND
        if self.other_tables is not None:
            from nextscale.transformer.positions import resample_table

            table_1LD = resample_table(table_1LD, self.tables, self.pyramid)
        return level_1ND + table_1LD[:, start:end]

    def predict_logits(self, x_BND: Tensor, conditioning: Conditioning) -> Tensor:
        """Logits (B, N, V), float32, from the last block's output."""
        scale, shift = conditioning.head_B2D.unsqueeze(2).unbind(1)
        return self.head(self.head_norm(x_BND, scale, shift)).float()


def scale_gammas(adaln_B3SD: Tensor, drop_path_SB: Tensor) -> Tensor:
    """adaLN values with the gammas of dropped branches set to zero, and the others divided by the keep probability."""
    factor_BS = drop_path_SB[: adaln_B3SD.shape[2]].T
    gamma_B1SD = adaln_B3SD[:, :1] * factor_BS[:, None, :, None]
    return torch.cat([gamma_B1SD, adaln_B3SD[:, 1:]], dim=1)
