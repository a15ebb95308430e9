"""Training the tokenizer: VQGAN's losses around VAR's residual quantiser (what VAR published only the class of)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.metrics.codebook import counts
from nextscale.metrics.lpips import Lpips
from nextscale.tokenizer.adversary import PatchDiscriminator, adaptive_weight, hinge_loss
from nextscale.tokenizer.codebook import CodebookLearner
from nextscale.tokenizer.quantizer import Quantized
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.train.tokenizer_config import CodebookConfig, TokenizerLossConfig


def to_unit(images_u8: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images_u8.float() / 127.5 - 1


class TokenizerTask:
    """Reconstruction, codebook, commitment, and optional perceptual and adversarial losses on uint8 images."""

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        images_B3HW: Tensor,
        losses: TokenizerLossConfig | None = None,
        codebook: CodebookConfig | None = None,
    ):
        self.tokenizer, self.images = tokenizer, images_B3HW
        self.losses, self.codebook = losses or TokenizerLossConfig(), codebook or CodebookConfig()
        self.examples = len(images_B3HW)
        decay = self.codebook.ema_decay if self.codebook.update == "ema" else None
        self.learner = CodebookLearner(tokenizer.quantizer, decay, self.codebook.revive_below)
        self.lpips = None
        if self.losses.lpips > 0:
            self.lpips = Lpips.from_files(Path(self.losses.lpips_vgg), Path(self.losses.lpips_linear))
        self.module: nn.Module = nn.ModuleDict({"tokenizer": tokenizer, "learner": self.learner})
        self.discriminator = None
        if self.losses.adversarial > 0:
            self.discriminator = PatchDiscriminator(
                self.losses.discriminator_channels, self.losses.discriminator_layers
            )
            self.module["discriminator"] = self.discriminator
        self.last: tuple[Quantized, Tensor] | None = None

    def loss(self, index_B: Tensor, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image_B3HW = to_unit(self.images[index_B])
        painted, quantized = self.tokenizer(image_B3HW)
        l1, l2 = F.l1_loss(painted, image_B3HW), F.mse_loss(painted, image_B3HW)
        loss = self.losses.l1 * l1 + self.losses.l2 * l2
        scalars = {"l1": l1.detach(), "vq": quantized.loss.detach()}
        if self.lpips is not None:
            perceptual = self.lpips(painted, image_B3HW).mean()
            loss, scalars["lpips"] = loss + self.losses.lpips * perceptual, perceptual.detach()
        if self.discriminator is not None:
            loss = loss + self._adversarial(self.discriminator, loss, image_B3HW, painted, step, scalars)
        config = self.tokenizer.config
        counts_KV = counts(quantized.tokens_BL, self.tokenizer.pyramid, config.vocab_size)
        self.last = quantized, counts_KV
        scalars["codes used"] = (counts_KV.sum(dim=0) > 0).float().mean()
        return loss + quantized.loss, scalars

    def _adversarial(
        self,
        judge: PatchDiscriminator,
        reconstruction: Tensor,
        image_B3HW: Tensor,
        painted: Tensor,
        step: int,
        scalars: dict[str, Tensor],
    ) -> Tensor:
        """The painter's and the judge's losses in one sum: each sees the other without gradient."""
        judged = hinge_loss(judge(image_B3HW), judge(painted.detach()))
        scalars["discriminator"] = judged.detach()
        if step < self.losses.adversarial_start:
            return judged
        judge.requires_grad_(False)
        fooled = -judge(painted).mean()
        judge.requires_grad_(True)
        last_layer = self.tokenizer.decoder.conv_out.weight
        return judged + self.losses.adversarial * adaptive_weight(reconstruction, fooled, last_layer) * fooled

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Moving averages and revival, from the batch of this step."""
        assert self.last is not None, "after_step follows loss"
        quantized, counts_KV = self.last
        self.learner.update(quantized, counts_KV)
        if self.codebook.revive_every and (step + 1) % self.codebook.revive_every == 0:
            self.learner.revive(quantized.wanted_BLC, rng)
