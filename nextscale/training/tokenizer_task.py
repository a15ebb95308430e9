"""Training the tokenizer: VQGAN's losses around VAR's residual quantiser (what VAR published only the class of)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.distributed import World
from nextscale.config.tokenizer_training import CodebookConfig, TokenizerLossConfig
from nextscale.data.examples import Batch, Examples
from nextscale.evaluation.metrics.codebook import count_codes
from nextscale.evaluation.metrics.lpips import Lpips
from nextscale.tokenizer.codebook import CodebookLearner
from nextscale.tokenizer.discriminator import PatchDiscriminator, compute_adaptive_weight, compute_hinge_loss
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit
from nextscale.training.engine.task import Task


class TokenizerTask(Task):
    """Reconstruction, codebook, commitment, and optional perceptual and adversarial losses on uint8 images.

    The adversarial loss is weighted by gradients of the portion of the batch at hand (as in VQGAN), so with it the
    result depends on how a batch is divided.
    """

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        examples: Examples,
        losses: TokenizerLossConfig | None = None,
        codebook: CodebookConfig | None = None,
    ):
        super().__init__()
        self.tokenizer, self.examples = tokenizer, examples
        self.losses, self.codebook = losses or TokenizerLossConfig(), codebook or CodebookConfig()
        self.tokens_per_example = tokenizer.pyramid.length
        # a phi that serves no scale of this pyramid
        self.leaves_parameters_unused = len(set(tokenizer.quantizer.phi_of_scale)) < len(tokenizer.quantizer.phi)
        decay = self.codebook.ema_decay if self.codebook.update == "ema" else None
        self.learner = CodebookLearner(tokenizer.quantizer, decay, self.codebook.revive_below)
        self.lpips = None
        if self.losses.lpips > 0:
            self.lpips = Lpips.from_files(Path(self.losses.lpips_vgg), Path(self.losses.lpips_linear))
        self.trained: nn.Module = nn.ModuleDict({"tokenizer": tokenizer, "learner": self.learner})
        self.discriminator = None
        if self.losses.adversarial > 0:
            self.discriminator = PatchDiscriminator(
                self.losses.discriminator_channels, self.losses.discriminator_layers
            )
            self.trained["discriminator"] = self.discriminator

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_B3HW = scale_to_unit(batch["image"])
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
        counts_KV = count_codes(quantized.tokens_BL, self.tokenizer.pyramid, config.vocab_size)
        self.learner.observe(quantized, counts_KV)
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
        judged = compute_hinge_loss(judge(image_B3HW), judge(painted.detach()))
        scalars["discriminator"] = judged.detach()
        if step < self.losses.adversarial_start:
            return judged
        judge.requires_grad_(False)
        fooled = -judge(painted).mean()
        judge.requires_grad_(True)
        last_layer = self.tokenizer.decoder.conv_out.weight
        return judged + self.losses.adversarial * compute_adaptive_weight(reconstruction, fooled, last_layer) * fooled

    def fast_modules(self) -> list[nn.Module]:
        return [self.tokenizer]

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """Moving averages and revival, from the whole batch of this step."""
        revive = self.codebook.revive_every and (step + 1) % self.codebook.revive_every == 0
        self.learner.update(world, rng if revive else None)
