"""Text as a condition: a sequence of vectors for cross-attention, and one vector of the whole text for adaLN.

The vectors are those of a frozen text encoder, projected, or of a small encoder of our own that reads UTF-8 bytes and
is trained with the transformer. Each sequence begins with a learned token, so that an empty text, which is "no
condition", has content too.

Letters: B batch, T tokens of the sequence, D width, E width of a frozen encoder's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.devices import copy_to, create_embedding
from nextscale.common.errors import UserError
from nextscale.common.precision import cast_for
from nextscale.common.text import cut_text
from nextscale.config.condition import ConditionConfig
from nextscale.transformer.condition import Condition, EmbeddedCondition, get_field
from nextscale.transformer.conditions.batch import Rows
from nextscale.transformer.conditions.layers import average_tokens, count_layer_multiply_adds, create_layers

START, PAD = 256, 257
"""Numbers of the first token of every text, and of what follows its end; smaller ones are bytes."""
_NEIGHBOURS = 2
"""Bytes on each side that our own encoder looks at before attention."""


class TextCondition(Condition):
    """A text: the encoder's output is the sequence; the first token's, projected, is the vector."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__(config, width)
        self.tokens = (EmbeddedText if config.embedding_width else ByteEncoder)(config, width)
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width)

    def forward(self, values: Any) -> EmbeddedCondition:
        sequence_BTD, vector_BD, mask_BT = self.tokens(values)
        return EmbeddedCondition(self.pool(self.norm(vector_BD)), self.norm(sequence_BTD), mask_BT)

    def parse(self, values: Any) -> Any:
        """Texts, None meaning "no text"; for embeddings of a frozen encoder (embeddings (B, t, E), lengths (B,))."""
        return self.tokens.parse(values)

    def from_batch(self, batch: Mapping[str, Any]) -> Any:
        """UTF-8 bytes (B, t), or embeddings (B, t, E), with the lengths (B,) in the field NAME_length."""
        name = self.batch_field
        return self.tokens.arrange(get_field(batch, name), get_field(batch, f"{name}_length"))

    def nothing(self, count: int) -> Any:
        return self.tokens.parse([None] * count)

    @classmethod
    def count_tokens(cls, config: ConditionConfig) -> int:
        return config.max_tokens

    @classmethod
    def count_multiply_adds(cls, config: ConditionConfig, width: int) -> int:
        T = config.max_tokens
        if config.embedding_width:
            return (T - 1) * config.embedding_width * width + width * width
        neighbours = T * (2 * _NEIGHBOURS + 1) * width * width
        return neighbours + config.layers * count_layer_multiply_adds(T, width) + width * width


class ByteEncoder(nn.Module):
    """A small transformer on UTF-8 bytes with learned positions. A batch of texts: int64 (B, max_tokens).

    A byte says little by itself: before attention each one sees its neighbours, as in CANINE (arXiv 2103.06874), whose
    first layer is local, too. Without it, a model told capital letters apart and not small ones, whose bytes are in
    other words as well.
    """

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__()
        self.max_tokens = config.max_tokens
        self.embedding = create_embedding(PAD + 1, width)
        self.positions = create_embedding(config.max_tokens, width)
        self.neighbours = nn.Linear((2 * _NEIGHBOURS + 1) * width, width)
        self.layers = create_layers(config.layers, width)

    def forward(self, text_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence (B, T, D), the first token's vector (B, D), and the mask (B, T)."""
        mask_BT = text_BT != PAD
        x_BTD = (self.embedding(text_BT) + self.positions.weight) * mask_BT[..., None]
        padded = F.pad(x_BTD, (0, 0, _NEIGHBOURS, _NEIGHBOURS))
        windows = padded.unfold(1, 2 * _NEIGHBOURS + 1, 1).flatten(2)  # (B, T, D times bytes)
        x_BTD = x_BTD + F.gelu(self.neighbours(windows))
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_BT)
        return x_BTD, x_BTD[:, 0], mask_BT

    def parse(self, texts: Sequence[str | None]) -> Tensor:
        """The bytes of texts; UserError for what is no text."""
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise UserError(f"a prompt is a text, or None for no text; got {text!r:.60}")
        rows = [list(cut_text((text or "").encode(), self.max_tokens - 1)) for text in texts]
        padded = [[START, *row] + [PAD] * (self.max_tokens - 1 - len(row)) for row in rows]
        return copy_to(torch.tensor(padded, dtype=torch.int64), self.embedding.weight.device)

    def arrange(self, bytes_Bt: Tensor, length_B: Tensor) -> Tensor:
        """A training batch of bytes as texts of the encoder."""
        if bytes_Bt.ndim != 2:
            raise UserError(f"our own text encoder reads bytes (B, t); the data have {tuple(bytes_Bt.shape)}")
        limit = self.max_tokens - 1
        text_BT = F.pad(bytes_Bt.long()[:, :limit], (1, max(limit - bytes_Bt.shape[1], 0)), value=START)
        places_T = torch.arange(self.max_tokens, device=text_BT.device)
        return torch.where(places_T <= length_B.view(-1, 1), text_BT, PAD)


class EmbeddedText(nn.Module):
    """Embeddings of a frozen text encoder, projected. A batch: `embeddings` (B, max_tokens - 1, E), `length` (B,)."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__()
        self.max_tokens, self.embedding_width = config.max_tokens, config.embedding_width
        self.project = nn.Linear(config.embedding_width, width)
        self.start = create_embedding(1, width)

    def forward(self, text: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence (B, T, D), the mean of its content (B, D), and the mask (B, T)."""
        x_BTD = self.project(cast_for(self.project, text["embeddings"]))
        start_B1D = self.start.weight.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        sequence_BTD = torch.cat([start_B1D, x_BTD], dim=1)
        mask_BT = torch.arange(self.max_tokens, device=x_BTD.device) <= text["length"].view(-1, 1)
        return sequence_BTD, average_tokens(sequence_BTD, mask_BT), mask_BT

    def parse(self, values: Any) -> Rows:
        """Embeddings (B, t, E) and lengths (B,) of texts; or a list of None."""
        device = self.start.weight.device
        if isinstance(values, Sequence) and all(value is None for value in values):
            embeddings, length = torch.zeros(len(values), 0, self.embedding_width), torch.zeros(len(values))
        elif isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], Tensor):
            embeddings, length = values
        else:
            raise UserError("this model reads texts through the text encoder that it was trained with")
        return self.arrange(copy_to(embeddings, device), copy_to(length, device))

    def arrange(self, embeddings_BtE: Tensor, length_B: Tensor) -> Rows:
        """A training batch of embeddings, cut or padded to the length of the sequence."""
        if embeddings_BtE.ndim != 3 or embeddings_BtE.shape[2] != self.embedding_width:
            shape = tuple(embeddings_BtE.shape)
            raise UserError(f"the model reads text embeddings (B, t, {self.embedding_width}); the data have {shape}")
        limit = self.max_tokens - 1
        padded = F.pad(embeddings_BtE[:, :limit], (0, 0, 0, max(limit - embeddings_BtE.shape[1], 0)))
        return Rows({"embeddings": padded, "length": length_B.long().clamp_max(limit)})
