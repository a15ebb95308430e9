"""How a codebook learns beside the gradient: moving averages, and the revival of dead codes.

Letters: B batch, L tokens of all scales, K scales, V codes, C code width, R rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nextscale.tokenizer.quantizer import Quantized, Quantizer

_USAGE_DECAY = 0.99


class Reducer(Protocol):
    """The processes that train together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""


class CodebookLearner(nn.Module):
    """Keeps a quantiser's usage statistics, revives dead codes, and with `ema` sets codes to moving averages.

    With `ema` a code is the average of the vectors that chose it lately (van den Oord et al. 2017, appendix A.1), and
    takes no gradient; phi still learns by gradient.
    """

    count_V: Tensor
    sum_VC: Tensor
    revived: Tensor
    """How many codes were revived so far."""

    def __init__(self, quantizer: Quantizer, ema_decay: float | None, revive_below: float):
        super().__init__()
        self.quantizer = [quantizer]  # in a list: its tensors are saved with the tokenizer, not here
        self.ema_decay, self.revive_below = ema_decay, revive_below
        codes_VC = quantizer.codebook.weight.detach()
        self.register_buffer("count_V", torch.ones(len(codes_VC)))
        self.register_buffer("sum_VC", codes_VC.clone())
        self.register_buffer("revived", torch.zeros((), dtype=torch.long))
        quantizer.codebook.weight.requires_grad_(ema_decay is None)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, quantized: Quantized, counts_KV: Tensor) -> None:
        """Store the looked-up vectors of one micro-batch. `counts_KV`: how often each code was chosen."""
        self._seen.append((quantized.tokens_BL, quantized.residual_BLC, counts_KV))

    def discard(self) -> None:
        """Forget the micro-batches since the last update."""
        self._seen.clear()

    @torch.no_grad()
    def update(self, world: Reducer, rng: torch.Generator | None) -> None:
        """Take the micro-batches of a step, over all processes, into the statistics and, with `ema`, into the codes.

        With `rng`, dead codes are then revived.
        """
        tokens_R = torch.cat([tokens for tokens, _, _ in self._seen]).flatten()
        residual_RC = torch.cat([residual for _, residual, _ in self._seen]).flatten(0, 1)
        counts_KV = world.sum(torch.stack([counts for _, _, counts in self._seen]).sum(dim=0).float())
        self._seen.clear()
        quantizer = self.quantizer[0]
        quantizer.usage_KV.lerp_(counts_KV, 1 - _USAGE_DECAY)
        if self.ema_decay is not None:
            summed_VC = world.sum(torch.zeros_like(self.sum_VC).index_add_(0, tokens_R, residual_RC))
            self.count_V.lerp_(counts_KV.sum(dim=0), 1 - self.ema_decay)
            self.sum_VC.lerp_(summed_VC, 1 - self.ema_decay)
            # codes that nobody chose keep their place: their sum and count shrink alike
            quantizer.codebook.weight.copy_(self.sum_VC / self.count_V.clamp_min(1e-5).unsqueeze(1))
        if rng is not None:
            self._revive(residual_RC, world, rng)

    def _revive(self, residual_RC: Tensor, world: Reducer, rng: torch.Generator) -> None:
        """Put dead codes where vectors of the batch are, and count them in `revived`."""
        quantizer = self.quantizer[0]
        use_V = quantizer.usage_KV.sum(dim=0)
        dead = (use_V < self.revive_below * use_V.mean()).nonzero().flatten()
        if len(dead) == 0:
            return
        rows = len(residual_RC)
        chosen = torch.randint(rows * world.size, (len(dead),), generator=rng).to(residual_RC.device)
        is_mine = (chosen // rows == world.rank).unsqueeze(1)  # processes hold consecutive parts of the batch
        chosen_RC = world.sum(torch.where(is_mine, residual_RC[chosen % rows], 0.0))
        quantizer.codebook.weight[dead] = chosen_RC
        # counted as average users at first, so that they have time to find users
        quantizer.usage_KV[:, dead] = quantizer.usage_KV.mean(dim=1, keepdim=True)
        self.count_V[dead] = 1.0
        self.sum_VC[dead] = chosen_RC
        self.revived += len(dead)
