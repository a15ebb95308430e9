"""One part of a checkpoint: its transformer's config, or its tokenizer."""

from __future__ import annotations

from dataclasses import replace

from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.tokenizer.tokenizer import Tokenizer


def get_transformer_config(config: ModelConfig, action: str) -> TransformerConfig:
    """The transformer's config; UserError for a tokenizer alone. `action`: a verb for the message, such as adapt."""
    if config.transformer is None:
        raise UserError(f"this checkpoint is a tokenizer alone: there is no transformer to {action}")
    return config.transformer


def load_tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> Tokenizer:
    """The checkpoint's tokenizer in float32, for the scales of `config`. Counts of code usage start at zero."""
    tokenizer, _ = build_modules(replace(config, transformer=None, class_names=()))
    weights = {n: t.float() for n, t in checkpoint.tokenizer.items() if n != "quantizer.usage_KV"}  # a row per scale
    tokenizer.load_state_dict(weights, strict=False)
    return tokenizer
