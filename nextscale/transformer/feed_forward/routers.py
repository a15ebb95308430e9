"""Routers: who decides which experts work on which tokens. Each is one class, and each gives a `Routing`.

Letters: B sequences, N tokens at hand, D width, K scales, M experts (those with an FFN first, then the idle ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.ops import Embedding, Linear, full_precision, linear
from nextscale.config.feed_forward import ExpertsConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext


@dataclass(frozen=True)
class Routing:
    """What a router decided, and the record that a mixture leaves of a pass."""

    logits_BNM: Tensor
    """float32: what the softmax is taken of."""
    scores_BNM: Tensor
    """float32: softmax over the experts, S of Eq. 8-10."""
    chosen_BNM: Tensor
    """bool: which experts work on which tokens."""
    gates_BNM: Tensor
    """float32: what an expert's output is multiplied by, G of Eq. 7; 0 where it was not chosen."""


def largest(scores: Tensor, count: int, dim: int) -> Tensor:
    """True for the `count` largest along `dim`; of equal ones the first, whatever the machine."""
    order = scores.argsort(dim=dim, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, order.narrow(dim, 0, count), True)


class Router(nn.Module):
    """What all routers share: a float32 softmax over scores, and the gates of those that are chosen."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__()
        self.config: ExpertsConfig = config.experts
        self.experts = config.experts.count + config.experts.zero_computation
        self.score = Linear(config.width, self.experts, bias=False)
        self.scale_embed: Embedding | None = None

    def forward(self, x_BND: Tensor, context: ScaleContext) -> Routing:
        with full_precision(x_BND):  # rounded scores would choose other experts
            logits_BNM = self.logits(x_BND, context)
            scores_BNM = logits_BNM.softmax(dim=-1)
            chosen_BNM = self.choose(scores_BNM.detach(), context)
            gates_BNM = torch.where(chosen_BNM, scores_BNM, 0)
            if self.config.renormalise:
                gates_BNM = gates_BNM / gates_BNM.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        return Routing(logits_BNM, scores_BNM, chosen_BNM, gates_BNM)

    def logits(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        """Scores of every token for every expert (B, N, M), float32."""
        return self._scored(x_BND)

    def choose(self, scores_BNM: Tensor, context: ScaleContext) -> Tensor:
        """Each token takes its m best experts (Eq. 7)."""
        return largest(scores_BNM, self.config.active, dim=-1)

    def pairs(self, shape: tuple[int, int], context: ScaleContext) -> int:
        """How many pairs of a token and an FFN expert `shape` (B, N) tokens make, at most."""
        batch, count = shape
        return batch * count * self.config.active

    def _scored(self, x: Tensor) -> Tensor:
        """x (..., D) times the routing matrix W."""
        return linear(x.float(), self.score.weight.float())


class ScaleTokenRouter(Router):
    """STMoE (MEPA, Eq. 9): S = softmax((SE(scale(x)) + x) W). Each token asks for experts, knowing its scale."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        if config.experts.scale_embedding:
            self.scale_embed = Embedding(scales, config.width)

    def logits(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        logits_BNM = self._scored(x_BND)
        if self.scale_embed is None:
            return logits_BNM
        return logits_BNM + self._scored(self.scale_embed.weight)[context.scales(x_BND.device)]


class ScaleRouter(Router):
    """SMoE (MEPA, Eq. 8): S = softmax(SE(scale(x)) W). Each scale asks once for all its tokens."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        self.scale_embed = Embedding(scales, config.width)

    def logits(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        assert self.scale_embed is not None, "made with the router"
        logits_KM = self._scored(self.scale_embed.weight)
        return logits_KM[context.scales(x_BND.device)].expand(*x_BND.shape[:2], -1)


class ExpertChoiceRouter(Router):
    """Expert choice (arXiv 2202.09368): each expert takes the tokens that want it most, within an image and a scale.

    So no image depends on another and no scale on a later one. Of N tokens an expert takes max(1, ceil(N m / M)); a
    token may have none or all of the experts. The load is even by construction.
    """

    def choose(self, scores_BNM: Tensor, context: ScaleContext) -> Tensor:
        segments = context.segments(scores_BNM.shape[1])
        return torch.cat([largest(scores_BNM[:, i:j], self._taken(j - i), dim=1) for i, j in segments], dim=1)

    def pairs(self, shape: tuple[int, int], context: ScaleContext) -> int:
        batch, count = shape
        return batch * self.experts * sum(self._taken(j - i) for i, j in context.segments(count))

    def _taken(self, count: int) -> int:
        """How many of `count` tokens an expert takes."""
        return -(-count * self.config.active // self.experts)


class ZeroComputationRouter(Router):
    """MoE++ (arXiv 2410.07348): tokens also choose among idle experts, and see what the block before scored."""

    def __init__(self, config: TransformerConfig, scales: int, block: int):
        super().__init__(config, scales, block)
        residual = config.experts.gating_residual and block > 0
        self.residual = Linear(self.experts, self.experts, bias=False) if residual else None

    def logits(self, x_BND: Tensor, context: ScaleContext) -> Tensor:
        logits_BNM = self._scored(x_BND)
        if self.residual is None or context.previous is None:
            return logits_BNM
        return logits_BNM + linear(context.previous.logits_BNM, self.residual.weight.float())


ROUTERS: dict[str, type[Router]] = {
    "stmoe": ScaleTokenRouter,
    "smoe": ScaleRouter,
    "expert-choice": ExpertChoiceRouter,
    "moe++": ZeroComputationRouter,
}
