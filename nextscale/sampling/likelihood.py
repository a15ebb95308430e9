"""The likelihood of given images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.sampling.sampler import check_finite_logits
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR


@torch.no_grad()
def compute_log_likelihood(tokenizer: Tokenizer, model: VAR, tokens_BL: Tensor, values: Any) -> Tensor:
    """Log-probability in nats of given tokens under the model, summed within each scale: (B, K), float32.

    No guidance, temperature or filter: what the cross-entropy of training measures, times the tokens of the scale.
    UserError when the logits are not finite.
    """
    tokens_BL = tokenizer.move_tokens(tokens_BL)
    logits_BLV = model(values, tokenizer.teacher_inputs(tokens_BL, checked=True)).logits_BNV
    token_BL = logits_BLV.log_softmax(dim=-1).gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    check_finite_logits(token_BL.isfinite().all())
    return torch.stack([token_BL[:, start:end].sum(dim=1) for start, end in model.pyramid.spans], dim=1)
