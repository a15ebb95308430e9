"""Routers: the layers that choose which experts work on which tokens. Each is one class, and each gives a `Routing`.

Letters: B sequences, N tokens at hand, D width, K scales, M experts (those with an FFN first, then the
zero-computation ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextscale.common.devices import create_embedding
from nextscale.common.precision import Float32Linear, compute_exactly
from nextscale.config.transformer import ExpertsConfig, TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.feed_forward.experts import gather_rows


@dataclass(frozen=True)
class Routing:
    """Router output: logits, scores, selected experts and gates."""

    logits_BNM: Tensor
    """float32: the softmax's input."""
    scores_BNM: Tensor
    """float32: softmax over the experts, S of Eq. 8-10."""
    selected_BNM: Tensor
    """bool: which experts work on which tokens."""
    gates_BNM: Tensor
    """float32: the factors of the experts' outputs, G of Eq. 7; 0 where an expert was not selected."""
    requested_BNM: Tensor | None = None
    """bool: the selection before full experts dropped tokens; None where experts have no capacity."""


def select_largest(scores: Tensor, count: int, dim: int) -> Tensor:
    """True for the `count` largest along `dim`; of equal ones the first, on every machine."""
    order = scores.argsort(dim=dim, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, order.narrow(dim, 0, count), True)


class Router(nn.Module):
    """Each token selects its m best experts by a float32 softmax. Subclass it for a router of your own:

    @ROUTERS.register("my-router")          # from nextscale.common.registry import ROUTERS
    class MyRouter(Router):
        def score_tokens(self, x_BND, context): ...     # logits (B, N, M)
        def select(self, scores_BNM, context): ...      # mask (B, N, M)
    """

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        """`scales`: number of scales of the pyramid. `block`: index of the block, from 0."""
        super().__init__()
        self.config: ExpertsConfig = config.experts
        self.experts = config.experts.count + config.experts.zero_computation
        self.score = Float32Linear(config.width, self.experts, bias=False)
        self.scale_embed: nn.Embedding | None = None
        """None too where all layers share one: it is in the context."""

    def finish_initialization(self, spread: float) -> None:
        """Make scale embeddings as large as the normalised tokens beside them. `spread`: their standard deviation."""
        if self.scale_embed is not None:
            self.scale_embed.weight.div_(spread)

    def add_scale_embedding(self, config: TransformerConfig, scales: int) -> None:
        """Give the router scale embeddings of its own, unless all layers share one."""
        if not config.experts.has_shared_scales:
            self.scale_embed = create_embedding(scales, config.width)

    def score_scales(self, context: ScaleContext) -> Tensor | None:
        """Logits of the scale embedding of each token at hand, (N, M) or (1, M), float32; None without embeddings."""
        embed_KD = context.router_scales_KD if self.scale_embed is None else self.scale_embed.weight
        if embed_KD is None:
            return None
        return gather_rows(self.score(embed_KD), context.index_scales(embed_KD.device))

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Record | None = None) -> Routing:
        """`previous`: the record of the block before."""
        with compute_exactly(x_BND):  # rounded scores would select other experts
            logits_BNM = self.score_tokens(x_BND, context)
            logits_BNM = self.add_previous(logits_BNM, previous)
            scores_BNM = logits_BNM.softmax(dim=-1)
            selected_BNM = self.select(scores_BNM.detach(), context)
            gates_BNM = torch.where(selected_BNM, scores_BNM, 0)
            if self.config.renormalise:
                gates_BNM = self.renormalise(gates_BNM)
        return Routing(logits_BNM, scores_BNM, selected_BNM, gates_BNM)

    def score_tokens(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        """Logits of every token for every expert (B, N, M), float32."""
        return self.score(x_BND)

    def add_previous(self, logits_BNM: Tensor, previous: Record | None) -> Tensor:
        """The logits with what the block before contributes: nothing."""
        return logits_BNM

    def select(self, scores_BNM: Tensor, context: ScaleContext) -> Tensor:
        """Which experts work on which tokens, bool (B, N, M): the m best of each token (Eq. 7)."""
        return select_largest(scores_BNM, self.config.active, dim=-1)

    def renormalise(self, gates_BNM: Tensor) -> Tensor:
        """The gates divided by their sum; those of a token without any stay 0."""
        return gates_BNM / gates_BNM.sum(dim=-1, keepdim=True).clamp_min(1e-9)

    def count_pairs(self, shape: tuple[int, int], context: ScaleContext) -> int:
        """Largest possible number of pairs of a token and an FFN expert for `shape` (B, N) tokens."""
        batch, count = shape
        return batch * count * self.config.active

    @classmethod
    def count_expert_calls(cls, config: ExpertsConfig, tokens: int) -> int:
        """FFN experts that work on `tokens` tokens of one scale of a sequence, at most."""
        return tokens * min(config.active, config.count)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        """Multiply-adds of the router for `tokens` tokens of one scale in the block of this index."""
        experts = config.experts
        return tokens * config.width * (experts.count + experts.zero_computation)


class ScaleTokenRouter(Router):
    """STMoE (MEPA, Eq. 9): S = softmax((SE(scale(x)) + x) W). Each token selects experts, knowing its scale."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        if config.experts.scale_embedding:
            self.add_scale_embedding(config, scales)

    def score_tokens(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        logits_BNM, of_scales = self.score(x_BND), self.score_scales(context)
        return logits_BNM if of_scales is None else logits_BNM + of_scales

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        scored = tokens + scales * config.experts.scale_embedding
        return super().count_multiply_adds(config, scales, scored, block)


class ScaleRouter(Router):
    """SMoE (MEPA, Eq. 8): S = softmax(SE(scale(x)) W). Each scale selects experts for all its tokens."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        self.add_scale_embedding(config, scales)

    def score_tokens(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        of_scales = self.score_scales(context)
        assert of_scales is not None, "the router has scale embeddings, or the model"
        return of_scales.expand(*x_BND.shape[:2], -1)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        return super().count_multiply_adds(config, scales, scales, block)


class ExpertChoiceRouter(Router):
    """Expert choice (arXiv 2202.09368): each expert selects its best tokens, within an image and a scale.

    So no image depends on another and no scale on a later one. Of N tokens an expert takes max(1, ceil(N m / M)); a
    token may have none or all of the experts. The load is even by construction.
    """

    def select(self, scores_BNM: Tensor, context: ScaleContext) -> Tensor:
        spans = context.list_spans(scores_BNM.shape[1])
        capacities = [compute_capacity(self.config, j - i) for i, j in spans]
        masks = [select_largest(scores_BNM[:, i:j], n, dim=1) for (i, j), n in zip(spans, capacities, strict=True)]
        return torch.cat(masks, dim=1)

    def count_pairs(self, shape: tuple[int, int], context: ScaleContext) -> int:
        batch, count = shape
        return batch * self.experts * sum(compute_capacity(self.config, j - i) for i, j in context.list_spans(count))

    @classmethod
    def count_expert_calls(cls, config: ExpertsConfig, tokens: int) -> int:
        return config.count * compute_capacity(config, tokens)


def compute_capacity(config: ExpertsConfig, tokens: int) -> int:
    """How many of `tokens` tokens each expert takes with expert choice."""
    return -(-tokens * config.active // config.count)


class ZeroComputationRouter(Router):
    """MoE++ (arXiv 2410.07348): zero-computation experts can be selected too, and a router adds the logits of the block
    before (gating residual).

    With a capacity factor an expert serves the first tokens of a scale, in raster order, that select it, up to its
    capacity (Eq. 8), and drops the others. The published layer counts the tokens of a batch; here they are those of one
    image and scale, so that no image depends on another and no scale on a later one.
    """

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        residual = config.experts.gating_residual and block > 0
        self.residual = Float32Linear(self.experts, self.experts, bias=False) if residual else None

    def add_previous(self, logits_BNM: Tensor, previous: Record | None) -> Tensor:
        if self.residual is None or previous is None or previous.routing is None:
            return logits_BNM
        return logits_BNM + self.residual(previous.routing.logits_BNM)

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Record | None = None) -> Routing:
        routing = super().forward(x_BND, context, previous)
        if not self.config.capacity_factor:
            return routing
        requested_BNM = routing.selected_BNM
        selected_BNM = requested_BNM & self.find_admitted(requested_BNM, context)
        gates_BNM = torch.where(selected_BNM, routing.gates_BNM, 0)
        return Routing(routing.logits_BNM, routing.scores_BNM, selected_BNM, gates_BNM, requested_BNM)

    def find_admitted(self, requested_BNM: Tensor, context: ScaleContext) -> Tensor:
        """Where an expert is not full yet, bool (B, N, M)."""
        parts = []
        for start, end in context.list_spans(requested_BNM.shape[1]):
            limits = compute_capacities(self.config, end - start)
            count_BnM = requested_BNM[:, start:end].cumsum(dim=1)
            kinds = count_BnM.split((self.config.count, self.config.zero_computation), dim=-1)
            parts.append(torch.cat([count <= limit for count, limit in zip(kinds, limits, strict=True)], dim=-1))
        return torch.cat(parts, dim=1)

    def renormalise(self, gates_BNM: Tensor) -> Tensor:
        if self.config.exclude_zero:
            first = self.config.count
            gates_BNM = gates_BNM.clone()
            gates_BNM[..., first : first + self.config.zero] = 0
        return super().renormalise(gates_BNM)

    def count_pairs(self, shape: tuple[int, int], context: ScaleContext) -> int:
        batch, count = shape
        return batch * sum(self.count_expert_calls(self.config, j - i) for i, j in context.list_spans(count))

    @classmethod
    def count_expert_calls(cls, config: ExpertsConfig, tokens: int) -> int:
        calls = super().count_expert_calls(config, tokens)
        if not config.capacity_factor:
            return calls
        return min(calls, config.count * min(tokens, compute_capacities(config, tokens)[0]))

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        total = super().count_multiply_adds(config, scales, tokens, block)
        if config.experts.gating_residual and block > 0:
            total += tokens * (config.experts.count + config.experts.zero_computation) ** 2
        return total


def compute_capacities(config: ExpertsConfig, tokens: int) -> tuple[int, int]:
    """How many of `tokens` tokens an FFN expert and a zero-computation expert take at most (MoE++, Eq. 8).

    Of the m selections of each token an even share is m tokens / (tau FFN experts + zero-computation experts), which an
    FFN expert takes tau times. At least 1.
    """
    share = tokens * config.active / (config.capacity_ratio * config.count + config.zero_computation)
    zero_computation = config.capacity_factor * share
    return max(1, math.ceil(config.capacity_ratio * zero_computation)), max(1, math.ceil(zero_computation))
