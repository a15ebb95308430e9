"""Training the transformer on tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.model.var import VAR
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.train.config import TrainConfig


class TransformerTask:
    """Cross-entropy of the tokens of all scales, given label and coarser scales (MEPA Eq. 4-5)."""

    name = "transformer"

    def __init__(self, model: VAR, tokenizer: Tokenizer, tokens_BL: Tensor, labels_B: Tensor, config: TrainConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tokens, self.labels = tokens_BL, labels_B
        self.examples = len(tokens_BL)
        self.module: nn.Module = model

    def loss(self, index_B: Tensor, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        tokens_BL, label_B = self.tokens[index_B], self.labels[index_B]
        drop_B = torch.rand(len(index_B), generator=rng) < self.config.label_drop
        values = self.model.condition.select(drop_B, label_B)
        keep = branch_keep(self.model, len(index_B), self.config.drop_path, rng)
        logits_BLV = self.model(values, self.tokenizer.teacher_inputs(tokens_BL), keep).logits_BNV
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        accuracy = (logits_BLV.argmax(-1) == tokens_BL).float().mean()
        return loss, {"accuracy": accuracy}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Nothing to do."""


def branch_keep(model: VAR, batch: int, rate: float, rng: torch.Generator) -> Tensor | None:
    """Stochastic depth (blocks, S, B): 0 where a branch is dropped, else 1 / keep probability. None when off."""
    if rate == 0:
        return None
    depth, layers = len(model.blocks), len(model.blocks[0].layers)
    keep_D11 = 1 - torch.linspace(0, rate, depth).view(-1, 1, 1)
    return (torch.rand(depth, layers, batch, generator=rng) < keep_D11) / keep_D11
