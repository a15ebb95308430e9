"""MoCo v2: another view of the same image should be recognised among a queue of other images.

Momentum Contrast (He et al. 2020, arXiv 1911.05722) with the head and the views of MoCo v2 (Chen et al. 2020, arXiv
2003.04297). Letters: B batch, D width of a key, Q keys in the queue.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.distributed import World
from nextscale.common.precision import compute_exactly
from nextscale.config.encoder import MocoConfig
from nextscale.encoders.self_supervised import SmallEncoder


class Branch(nn.Module):
    """An encoder and its head: views to unit vectors."""

    def __init__(self, encoder: SmallEncoder, config: MocoConfig):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(encoder.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.key_width)
        )

    def forward(self, view_B3HW: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder.forward_map(view_B3HW).mean(dim=(2, 3))).float(), dim=1)


class Moco(nn.Module):
    """The trained branch, the momentum branch that computes keys, and the queue; a training state holds all three."""

    queue_QD: Tensor
    """Latest keys, unit vectors; a ring."""
    next: Tensor
    """Position in the queue of the next key."""

    def __init__(self, encoder: SmallEncoder, config: MocoConfig):
        super().__init__()
        self.config = config
        self.query = Branch(encoder, config)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue_QD", F.normalize(torch.randn(config.queue, config.key_width), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))
        self._keys: list[Tensor] = []

    def forward(self, query_B3HW: Tensor, key_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE in nats, a mean over the batch, and the share of images whose own key is nearer than the queue's.

        The keys are kept until `update`.
        """
        query_BD = self.query(query_B3HW)
        with torch.no_grad():
            key_BD = self.key(key_B3HW)
        self._keys.append(key_BD)
        return info_nce(query_BD, key_BD, self.queue_QD, self.config.temperature)

    def discard(self) -> None:
        """Forget the keys since the last update."""
        self._keys.clear()

    @torch.no_grad()
    def update(self, world: World) -> None:
        """After an optimizer step: put the keys of the complete batch into the queue, and move the key branch."""
        keys_BD = world.gather(torch.cat(self._keys))
        self._keys.clear()
        positions_B = (self.next + torch.arange(len(keys_BD), device=keys_BD.device)) % len(self.queue_QD)
        self.queue_QD[positions_B] = keys_BD
        self.next.copy_((self.next + len(keys_BD)) % len(self.queue_QD))
        for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.config.momentum)


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_QD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss, accuracy) of finding each query's own key among the queue (van den Oord et al. 2018, arXiv 1807.03748).

    Loss: -log(exp(q k / T) / (exp(q k / T) + sum over the queue exp(q k' / T))), a mean over the batch, float32.
    """
    with compute_exactly(query_BD):
        own_B1 = (query_BD * key_BD).sum(dim=1, keepdim=True)
        logits = torch.cat([own_B1, query_BD @ queue_QD.T], dim=1) / temperature
        target_B = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits, target_B)
    return loss, (logits.detach().argmax(dim=1) == 0).float().mean()
