"""Training tasks of `nextscale sparsify`: tuning for sparse hidden units, training routers, adapting to them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nextscale.config.training import TrainConfig
from nextscale.data.examples import Batch, Examples
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.engine.task import Task
from nextscale.training.transformer import FrozenNetworks, TransformerTask, read_batch
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.records import Norms
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.var import VAR, Output


def list_ffns(model: VAR) -> list[DynamicFeedForward]:
    """The dynamic FFN of every block."""
    return [cast(DynamicFeedForward, block.ffn) for block in model.blocks]


class TuneTask(TransformerTask):
    """Cross-entropy with the square Hoyer penalty on hidden units (DMoE-VAR, Eq. 1).

    Where late scales have FFNs of their own, only those are trained.
    """

    name = "tuning"

    def __init__(self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig, hoyer: float):
        super().__init__(model, tokenizer, examples, config)
        self.hoyer, self.thresholds = hoyer, Thresholds((1.0,) * len(model.pyramid), record="sparsity")
        _freeze_other_parameters(model)

    def add_losses(
        self, loss: Tensor, output: Output, batch: Batch, pyramid: Pyramid
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, scalars = super().add_losses(loss, output, batch, pyramid)
        sparsities = collect(output.records, "sparsity")
        hoyer = torch.stack([sparsity.hoyer for sparsity in sparsities]).mean()
        zeros = torch.stack([sparsity.zeros for sparsity in sparsities]).mean().detach()
        return loss + self.hoyer * hoyer, {**scalars, "hoyer": hoyer.detach(), "zeros": zeros}


class AdaptTask(TransformerTask):
    """Cross-entropy of the model with only the experts that the routers select at these thresholds.

    The routers are not trained, and the selection has no gradient.
    """

    name = "adapting"

    def __init__(
        self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig, thresholds: Thresholds
    ):
        super().__init__(model, tokenizer, examples, config)
        self.thresholds = thresholds
        _freeze_other_parameters(model)
        for ffn in list_ffns(model):
            cast(nn.Module, ffn.router).requires_grad_(False)


def _freeze_other_parameters(model: VAR) -> None:
    """Freeze the head of semantic guidance; where late scales have FFNs of their own, everything except those."""
    if model.projector is not None:
        model.projector.requires_grad_(False)
    if model.config.dynamic.late_ffn:
        model.requires_grad_(False)
        for ffn in list_ffns(model):
            cast(nn.Module, ffn.late).requires_grad_(True)


class RouterTask(Task):
    """Regression of the norms of the experts' outputs (DMoE-VAR, Eq. 2). Only the routers are trained.

    The squared error of a block is divided by the mean square of its targets. So a router that predicts 0 has an error
    of 1, and all blocks have the same weight; the optimum of a block does not change. Labels are dropped at random as
    in training, for the unconditional branch of guidance.
    """

    name = "routers"

    def __init__(self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig):
        super().__init__()
        self.model, self.config, self.examples = model, config, examples
        self.frozen = FrozenNetworks(tokenizer)
        model.requires_grad_(False)
        self.trained = nn.ModuleList([cast(nn.Module, ffn.router) for ffn in list_ffns(model)])
        self.trained.requires_grad_(True)
        self.thresholds = Thresholds((1.0,) * len(model.pyramid), record="norms")
        self.tokens_per_example = model.pyramid.length
        self.micro_batch_matters = "errors are divided by the mean square of the targets of each"

    def fast_modules(self) -> list[nn.Module]:
        return [self.model]

    def check_batch(self, batch: Batch) -> None:
        if "tokens" in batch:
            self.frozen.tokenizer.check_tokens(batch["tokens"])

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"drop": self.model.condition.draw_drop(count, self.config.label_drop, rng)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        _, inputs_BLC = read_batch(batch, self.frozen.tokenizer)
        values = self.model.condition.from_batch(batch)
        values = self.model.condition.drop(noise["drop"], values) if noise else values
        output = self.model(values, inputs_BLC, thresholds=self.thresholds)
        norms = collect(output.records, "norms")
        errors = [(n.predicted_BNE - n.true_BNE).square().mean() / n.true_BNE.square().mean() for n in norms]
        loss = torch.stack(errors).mean()
        with torch.no_grad():
            recall = torch.stack([_compute_recall(n) for n in norms]).mean()
        return loss, {"relative_error": loss.detach(), "recall": recall}


def _compute_recall(norms: Norms) -> Tensor:
    """Of the larger half of each token's experts by true norms, the share that is in the larger half by predictions."""
    half = max(1, norms.true_BNE.shape[-1] // 2)
    true, predicted = (t.topk(half, dim=-1).indices for t in (norms.true_BNE, norms.predicted_BNE))
    return (true.unsqueeze(-1) == predicted.unsqueeze(-2)).any(dim=-1).float().mean()
