"""What `nextscale sparsify` trains: the ReLU model towards sparse hidden units, routers, and what routers choose."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nextscale.config.training import TrainConfig
from nextscale.data.examples import Batch, Examples
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.engine.task import Task
from nextscale.training.transformer_task import TransformerTask, read_batch
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.records import Norms, Sparsity, recorded
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.var import VAR, Output


def layers(model: VAR) -> list[DynamicFeedForward]:
    """The dynamic FFN of every block."""
    return [module for module in model.modules() if isinstance(module, DynamicFeedForward)]


class TuneTask(TransformerTask):
    """Cross-entropy with the square Hoyer penalty on hidden units (DMoE-VAR, Eq. 1).

    Where late scales have FFNs of their own, those alone are trained.
    """

    name = "tuning"

    def __init__(self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig, hoyer: float):
        super().__init__(model, tokenizer, examples, config)
        self.hoyer, self.thresholds = hoyer, Thresholds((1.0,) * len(model.pyramid), record="sparsity")
        _freeze(model)

    def _whole_loss(self, loss: Tensor, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, others = super()._whole_loss(loss, output, batch)
        found = recorded(output.records, Sparsity)
        hoyer = torch.stack([r.hoyer for r in found]).mean()
        zeros = torch.stack([r.zeros for r in found]).mean().detach()
        return loss + self.hoyer * hoyer, {**others, "hoyer": hoyer.detach(), "zeros": zeros}


class AdaptTask(TransformerTask):
    """Cross-entropy of the model that runs a part of its experts, as `thresholds` and the routers choose them.

    The choice itself has no gradients, and the routers stay as they are.
    """

    name = "adapting"

    def __init__(
        self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig, thresholds: Thresholds
    ):
        super().__init__(model, tokenizer, examples, config)
        self.thresholds = thresholds
        _freeze(model)
        for layer in layers(model):
            cast(nn.Module, layer.router).requires_grad_(False)


def _freeze(model: VAR) -> None:
    """What the whole model's trainings leave alone: guidance's head; all but the late FFNs where there are such."""
    if model.projector is not None:
        model.projector.requires_grad_(False)
    if model.config.dynamic.own:
        model.requires_grad_(False)
        for layer in layers(model):
            cast(nn.Module, layer.late).requires_grad_(True)


class RouterTask(Task):
    """Each router learns to predict the norm of its experts' outputs (Eq. 2), by regression; nothing else changes.

    The squared error of a block is divided by the mean square of its targets, so that 1 is what predicting nothing
    gives and blocks count alike; per block that changes no optimum. Labels are left out at
    random as in training, for the unconditional branch of guidance.
    """

    name = "routers"

    def __init__(self, model: VAR, tokenizer: Tokenizer, examples: Examples, config: TrainConfig):
        super().__init__()
        self.model, self.config, self.examples = model, config, examples
        self._frozen = (tokenizer,)  # in a tuple: no part of what is trained, moved or saved
        model.requires_grad_(False)
        self.trained = nn.ModuleList([cast(nn.Module, layer.router) for layer in layers(model)])
        self.trained.requires_grad_(True)
        self.thresholds = Thresholds((1.0,) * len(model.pyramid), record="norms")
        self.tokens_per_example = model.pyramid.length

    def noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"drop": torch.rand(count, generator=rng) < self.config.label_drop}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        label_B, _, inputs_BLC = read_batch(batch, self._frozen[0])
        values = self.model.condition.select(noise["drop"], label_B) if noise else label_B
        output = self.model(values, inputs_BLC, thresholds=self.thresholds)
        found = recorded(output.records, Norms)
        errors = [(r.predicted_BNE - r.true_BNE).square().mean() / r.true_BNE.square().mean() for r in found]
        loss = torch.stack(errors).mean()
        with torch.no_grad():  # of the experts that matter most, how many would be found
            recall = torch.stack([_recall(r) for r in found]).mean()
        return loss, {"relative_error": loss.detach(), "recall": recall}


def _recall(norms: Norms) -> Tensor:
    """Share of each token's larger half of experts, by true norms, that are in the predicted larger half."""
    half = max(1, norms.true_BNE.shape[-1] // 2)
    true, predicted = (t.topk(half, dim=-1).indices for t in (norms.true_BNE, norms.predicted_BNE))
    return (true.unsqueeze(-1) == predicted.unsqueeze(-2)).any(dim=-1).float().mean()
