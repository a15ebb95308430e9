"""How a codebook learns beside the gradient: moving averages, and the revival of dead codes.

Letters: B batch, L tokens of all scales, K scales, V codes, C code width, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.tokenizer.quantizer import Quantized, Quantizer

_USAGE_DECAY = 0.99


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

    @torch.no_grad()
    def update(self, quantized: Quantized, counts_KV: Tensor) -> None:
        """Take one batch into the statistics and, with `ema`, into the codes."""
        quantizer = self.quantizer[0]
        quantizer.usage_KV.lerp_(counts_KV.to(quantizer.usage_KV), 1 - _USAGE_DECAY)
        if self.ema_decay is None:
            return
        tokens_R, wanted_RC = quantized.tokens_BL.flatten(), quantized.wanted_BLC.flatten(0, 1)
        summed_VC = torch.zeros_like(self.sum_VC).index_add_(0, tokens_R, wanted_RC)
        self.count_V.lerp_(counts_KV.sum(dim=0).to(self.count_V), 1 - self.ema_decay)
        self.sum_VC.lerp_(summed_VC, 1 - self.ema_decay)
        # codes that nobody chose keep their place: their sum and count shrink alike
        quantizer.codebook.weight.copy_(self.sum_VC / self.count_V.clamp_min(1e-5).unsqueeze(1))

    @torch.no_grad()
    def revive(self, wanted_BLC: Tensor, rng: torch.Generator) -> None:
        """Put dead codes where vectors of this batch are, and count them in `revived`."""
        quantizer = self.quantizer[0]
        use_V = quantizer.usage_KV.sum(dim=0)
        dead = (use_V < self.revive_below * use_V.mean()).nonzero().flatten()
        if len(dead) == 0:
            return
        rows_RC = wanted_BLC.flatten(0, 1)
        chosen_RC = rows_RC[torch.randint(len(rows_RC), (len(dead),), generator=rng).to(rows_RC.device)]
        quantizer.codebook.weight[dead] = chosen_RC
        # counted as average users at first, so that they have time to find users
        quantizer.usage_KV[:, dead] = quantizer.usage_KV.mean(dim=1, keepdim=True)
        self.count_V[dead] = 1.0
        self.sum_VC[dead] = chosen_RC
        self.revived += len(dead)
