"""Training an encoder without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.distributed import World
from nextscale.common.rng import fold_seed
from nextscale.config.encoder import EncoderConfig, MocoConfig, ViewConfig
from nextscale.data.examples import Batch, Examples
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.training.engine.task import Task
from nextscale.training.moco import Moco
from nextscale.training.views import DRAWS, view


class EncoderTask(Task):
    """MoCo v2 on uint8 images. An example's loss depends on itself and on the queue as it was before the step."""

    name = "encoder"

    def __init__(self, encoder: SmallEncoder, examples: Examples, moco: MocoConfig, views: ViewConfig):
        super().__init__()
        self.moco, self.examples, self.views = Moco(encoder, moco), examples, views
        self.trained = self.moco

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"views": torch.rand(count, 2, DRAWS, generator=rng)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["image"].device.type, enabled=False):
            query_B3HW, key_B3HW = (view(batch["image"], noise["views"][:, i], self.views) for i in range(2))
        loss, accuracy = self.moco(query_B3HW, key_B3HW)
        return loss, {"own_key_nearest": accuracy}

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """Queue and momentum encoder, from the whole batch."""
        self.moco.learn(world)


def new_encoder_task(
    config: EncoderConfig, examples: Examples, moco: MocoConfig, views: ViewConfig, seed: int
) -> EncoderTask:
    """The task of training a new encoder; all weights, and the queue's first keys, follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "encoder"))
        return EncoderTask(SmallEncoder(config), examples, moco, views)
