"""Training the transformer on tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.training import TrainConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.data.examples import Batch, Examples
from nextscale.encoders.patches import PatchEncoder
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit
from nextscale.training.engine.task import Task
from nextscale.transformer.feed_forward.balance import compute_balance_loss, compute_expert_load
from nextscale.transformer.feed_forward.interface import collect
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.projector import compute_alignment_loss, parse_scale_group
from nextscale.transformer.var import VAR, Output


class TransformerTask(Task):
    """Cross-entropy of the tokens of all scales, given label and coarser scales (MEPA Eq. 4-5), with the losses of
    mixtures of experts (Eq. 10) and of semantic guidance (Eq. 12-13) where the model has them.

    Batches hold `label` and either `tokens` (B, L), from a cache, or `image` (uint8), which is encoded first. What
    guidance aims at are the batch's `features` (B, h, w, E), or else those of the `encoder`.
    """

    name = "transformer"
    thresholds: Thresholds | None = None
    """What dynamic experts do in training: all of them run; a task may record what they did."""

    def __init__(
        self,
        model: VAR,
        tokenizer: Tokenizer,
        examples: Examples,
        config: TrainConfig,
        loss: LossConfig | None = None,
        encoder: PatchEncoder | None = None,
    ):
        super().__init__()
        self.model, self.config, self.loss = model, config, loss or LossConfig()
        self._frozen = (tokenizer, encoder)  # in a tuple: no part of what is trained, moved or saved
        self.examples, self.trained = examples, model
        self.tokens_per_example = model.pyramid.length
        scales = parse_scale_group(self.loss.group, len(model.pyramid))
        self.guided_scales = scales if self.loss.encoder else ()

    @property
    def tokenizer(self) -> Tokenizer:
        """What encodes images; it must be on the device of the model."""
        return self._frozen[0]

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        drop_B = torch.rand(count, generator=rng) < self.config.label_drop
        keep = branch_keep(self.model, count, self.config.drop_path, rng)
        return {"drop": drop_B} if keep is None else {"drop": drop_B, "keep": keep}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        label_B, tokens_BL, inputs_BLC = read_batch(batch, self.tokenizer)
        values = self.model.condition.drop(noise["drop"], label_B) if noise else label_B
        keep = noise["keep"].permute(1, 2, 0) if "keep" in noise else None
        guided = max(self.guided_scales, default=-1) + 1
        output = self.model(values, inputs_BLC, drop_path=keep, aligned_scales=guided, thresholds=self.thresholds)
        smoothing = self.config.label_smoothing if noise else 0.0
        nats_R = F.cross_entropy(
            output.logits_BNV.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=smoothing
        )
        nats_BL, right_BL = nats_R.view_as(tokens_BL), output.logits_BNV.detach().argmax(-1) == tokens_BL
        loss, others = self._whole_loss(nats_BL.mean(), output, batch)
        scalars = {
            "cross_entropy": nats_BL.detach().mean(),
            "accuracy": right_BL.float().mean(),
            "loss_per_scale": self._per_scale(nats_BL.detach()),
            "accuracy_per_scale": self._per_scale(right_BL.float()),
        }
        return loss if noise else nats_BL.mean(), scalars | others

    def _whole_loss(self, loss: Tensor, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy with what stands beside it, and each of those by name."""
        others: dict[str, Tensor] = {}
        if output.projected_BNE is not None:
            guidance = compute_alignment_loss(
                output.projected_BNE, self._features(batch), self.model.pyramid, self.guided_scales
            )
            loss = guidance + self.loss.cross_entropy * loss
            others["guidance"] = guidance.detach()
        routings = collect(output.records, "routing")
        if routings:
            idle = self.model.config.experts.zero_computation
            balance = sum(compute_balance_loss(r, idle, self.loss.idle_balance) for r in routings)
            assert isinstance(balance, Tensor), "a sum of losses"
            loss = loss + self.loss.balance * balance
            others["balance"] = balance.detach() / len(routings)
            others["expert_load"] = torch.stack([compute_expert_load(r.selected_BNM) for r in routings]).mean(dim=0)
        return loss, others

    @torch.no_grad()
    def _features(self, batch: Batch) -> Tensor:
        """What guidance aims at, (B, h, w, E)."""
        if "features" in batch:
            return batch["features"]
        encoder = self._frozen[1]
        assert encoder is not None, "open_parts gives an encoder where a cache has no features"
        with torch.autocast(batch["image"].device.type, enabled=False):
            return encoder(scale_to_unit(batch["image"]), self.model.pyramid.last)

    def _per_scale(self, values_BL: Tensor) -> Tensor:
        return torch.stack([values_BL[:, start:end].mean() for start, end in self.model.pyramid.spans])

    def fast_modules(self) -> list[nn.Module]:
        return [self.model]

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def describe_faulty_scales(self, scalars: dict[str, Any]) -> str:
        finite = scalars["loss_per_scale"].isfinite().tolist()
        sides = [f"{h}x{w}" for (h, w), good in zip(self.model.pyramid.sides, finite, strict=True) if not good]
        return "all scales" if not any(finite) else f"scale {', '.join(sides)}" if sides else ""


def read_batch(batch: Batch, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B,), tokens (B, L) and the transformer's inputs (B, L - first scale, C) of a batch, tokens or images."""
    label_B = batch["label"]
    with torch.autocast(label_B.device.type, enabled=False):  # rounding would change tokens
        tokens_BL = batch["tokens"].long() if "tokens" in batch else tokenizer.encode(scale_to_unit(batch["image"]))
        return label_B, tokens_BL, tokenizer.teacher_inputs(tokens_BL)


def branch_keep(model: VAR, batch: int, rate: float, rng: torch.Generator) -> Tensor | None:
    """Stochastic depth (B, blocks, S): 0 where a branch is dropped, else 1 / keep probability. None when off."""
    if rate == 0:
        return None
    depth, layers = len(model.blocks), max(len(block.layers) for block in model.blocks)
    keep_D1 = 1 - torch.linspace(0, rate, depth).view(-1, 1)
    return (torch.rand(batch, depth, layers, generator=rng) < keep_D1) / keep_D1
