"""What a run of `nextscale train` reads of captions, as the condition of its model says."""

from __future__ import annotations

import dataclasses

from nextscale.checkpoints import Checkpoint
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.model import ModelConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import CachedExamples
from nextscale.data.cache_head import TextHead
from nextscale.data.captions import TextInput, list_caption_parts, reads_embeddings
from nextscale.data.examples import Examples


def choose_text(config: RunConfig, checkpoint: Checkpoint) -> TextInput | None:
    """What batches hold of the captions, by the condition of the start checkpoint or of the run; None = nothing."""
    started = checkpoint.config.transformer if config.start else None
    return TextInput.of_condition((started or config.transformer).condition)


def read_text_encoder(model: ModelConfig, config: RunConfig, examples: Examples) -> ModelConfig:
    """The config with the text encoder of the token cache, if captions are read as its embeddings. UserError when the
    start checkpoint was trained with another one."""
    head = examples.text_head if isinstance(examples, CachedExamples) else None
    assert model.transformer is not None, "a generator has a transformer"
    condition = model.transformer.condition
    parts = [part for part in list_caption_parts(condition) if reads_embeddings(part)]
    if head is None or not parts:
        return model
    for part in parts:
        if part.encoder_fingerprint not in ("", head.encoder) or part.encoder not in ("", "cache", head.source):
            raise UserError(
                f"{config.data} has embeddings of captions by {head.source} with {head.max_tokens} tokens; the model "
                f"reads others: make it again with `nextscale tokenize --text-encoder {part.encoder} --text-max-tokens "
                f"{part.max_tokens - 1}`"
            )
    fitted = _fit_text(condition, head)
    return dataclasses.replace(model, transformer=dataclasses.replace(model.transformer, condition=fitted))


def _fit_text(condition: ConditionConfig, head: TextHead) -> ConditionConfig:
    """The condition with the text encoder of a token cache, where it reads embeddings of captions."""
    if condition.parts:
        parts = {name: _fit_text(part, head) for name, part in condition.parts.items()}
        return dataclasses.replace(condition, parts=parts)
    if not (list_caption_parts(condition) and reads_embeddings(condition)):
        return condition
    return dataclasses.replace(
        condition, embedding_width=head.width, encoder=head.source, encoder_fingerprint=head.encoder,
        max_tokens=head.max_tokens + 1,  # and the learned first token
    )  # fmt: skip
