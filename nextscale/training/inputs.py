"""Tokens of a batch of examples, and what the transformer sees of them."""

from __future__ import annotations

from torch import Tensor

from nextscale.common.precision import compute_exactly
from nextscale.data.examples import Batch
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit


def read_tokens(batch: Batch, tokenizer: Tokenizer) -> Tensor:
    """Tokens (B, L), int64, of a batch on the tokenizer's device: `tokens`, else those of `image` (uint8)."""
    return batch["tokens"].long() if "tokens" in batch else tokenizer.encode(scale_to_unit(batch["image"]))


def read_batch(batch: Batch, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and teacher-forced inputs (B, L - first scale, C) of a batch of tokens or images.

    `Task.check_batch` has checked the tokens.
    """
    tokens_BL = read_tokens(batch, tokenizer)
    with compute_exactly(tokens_BL):  # rounding would change them
        return tokens_BL, tokenizer.teacher_inputs(tokens_BL, checked=True)
