"""Frozen text encoders, loaded with transformers: T5's encoder and the text towers of CLIP and SigLIP.

Each is used as it was trained:

- T5: tokens attend to all tokens of the text. Padding is masked.
- CLIP: tokens attend to earlier ones, so padding behind the text has no effect.
- SigLIP: texts are padded to the model's full length and the padding is not masked. Of the sequence
  only the places of the text itself are kept.

The one vector that CLIP and SigLIP have for a whole text is not used: a model projects the mean of the sequence.

On a CPU each text is encoded by itself, so its embedding does not depend on the others, bit for bit. On a GPU texts of
similar length share a batch, and embeddings are equal up to rounding. Embeddings have 16 bits, in a token cache and for
sampling alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.checkpoints.hub import find_checkpoint
from nextscale.common.errors import UserError
from nextscale.common.extras import import_extra
from nextscale.common.fingerprint import compute_fingerprint, fingerprint_bytes
from nextscale.common.reading import read_json

_MODELS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "siglip": "SiglipTextModel"}
"""transformers' classes by the family of `model_type`, without the ending _text_model."""
_TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""Files of a tokenizer; one of these sets must be there."""
_OTHER_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_EXPECTED = (
    "the folder of a T5 encoder, or of a CLIP or SigLIP model, with config.json, model.safetensors and its tokenizer "
    "(tokenizer.json, spiece.model, or vocab.json and merges.txt), such as `hf download google/flan-t5-base "
    "--local-dir FOLDER` fetches from the Hugging Face hub"
)
_BATCH = 64
"""Texts in a batch on a GPU."""


@dataclass(frozen=True)
class TextBatch:
    """Embeddings of B texts, padded with zeros to T tokens."""

    text_BTE: Tensor
    """float16."""
    length_B: Tensor
    """int64: tokens of each text."""


class TextEncoder(nn.Module):
    """A frozen text encoder with its tokenizer. Computes in float32 and gives float16, without gradients."""

    def __init__(self, model: Any, tokenizer: Any, family: str, max_tokens: int, source: str, files: str):
        """`family`: t5, clip or siglip. `files`: a digest of config.json and the tokenizer's files."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.family, self.max_tokens, self.source, self.files = (
            tokenizer, family, max_tokens, source, files
        )  # fmt: skip
        self.width = int(model.config.hidden_size)
        self.positions = int(model.config.max_position_embeddings) if family == "siglip" else 0

    def fingerprint(self) -> str:
        """A checksum of the weights, config.json, the tokenizer's files and the number of tokens."""
        return compute_fingerprint(self.model.state_dict(), repr((self.family, self.files, self.max_tokens)))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, with the start and end tokens of the encoder; long ones are cut to `max_tokens`."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]

    def list_truncated(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that have more than `max_tokens` tokens."""
        tokens = self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        return [text for text, ids in zip(texts, tokens, strict=True) if len(ids) > self.max_tokens]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (tokens, E) of each text, float16, on the CPU. An empty text has no tokens: it stands for "no
        text".

        Raises UserError when an embedding is beyond the range of 16 bits.
        """
        tokens = self.tokenize(texts)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(tokens[i]))
        count = 1 if self.model.device.type == "cpu" else _BATCH
        sequences = [torch.zeros(0, self.width, dtype=torch.float16)] * len(texts)
        for start in range(0, len(order), count):
            rows = order[start : start + count]
            states_BTE = self([tokens[i] for i in rows])
            for n, i in enumerate(rows):
                sequences[i] = _narrow(states_BTE[n, : len(tokens[i])], texts[i])
        return sequences

    def encode_batch(self, texts: Sequence[str]) -> TextBatch:
        """As `encode`, padded with zeros to `max_tokens`."""
        return TextBatch(*pad_sequences(self.encode(texts), self.max_tokens))

    def forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Outputs (B, T, E), float32, of tokens that are padded to the longest text, or as SigLIP is."""
        length = self.positions or max(map(len, tokens))
        pad = self.tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in tokens], device=self.model.device)
        inputs = {"input_ids": ids_BT}
        if not self.positions:
            stop_B1 = torch.tensor([[len(ids)] for ids in tokens], device=self.model.device)
            inputs["attention_mask"] = (torch.arange(length, device=self.model.device) < stop_B1).long()
        states_BTE: Tensor = self.model(**inputs).last_hidden_state
        return states_BTE


def pad_sequences(sequences: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Sequences (tokens, E) as one tensor (B, length, E), padded with zeros, and their lengths, int64 (B,)."""
    text_BTE = sequences[0].new_zeros(len(sequences), length, sequences[0].shape[-1])
    for row_TE, sequence in zip(text_BTE, sequences, strict=True):
        row_TE[: len(sequence)] = sequence
    return text_BTE, torch.tensor([*map(len, sequences)], dtype=torch.int64)


def _narrow(values: Tensor, text: str) -> Tensor:
    narrow = values.half().cpu()
    if not narrow.isfinite().all():
        raise UserError(f"the embedding of {text[:60]!r} is beyond the range of 16 bits: use another text encoder")
    return narrow


def load_text_encoder(source: str, max_tokens: int) -> TextEncoder:
    """The text encoder of a folder in transformers' format, or of a name on the hub, on the CPU.

    `max_tokens`: longer texts are cut. Raises UserError naming the files that are missing, when it is another network,
    when it takes fewer tokens, or when transformers or sentencepiece is missing.
    """
    transformers = import_extra("transformers", "loading a text encoder")
    folder = _find_folder(source)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        family = str(config.model_type).removesuffix("_text_model")
        if family not in _MODELS:
            raise UserError(f"{source} is a '{config.model_type}'; text encoders are {', '.join(_MODELS)}")
        with _hide_reports(transformers):
            model, report = getattr(transformers, _MODELS[family]).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        tokenizer = _load_tokenizer(transformers, folder, source)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises nearly every type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load a text encoder from '{source}' ({reason}); expected {_EXPECTED}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the weights of {source} lack {len(missing)} tensors, such as {missing[0]}")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {source} has {len(tokenizer)} tokens, more than its model knows")
    positions = getattr(model.config, "max_position_embeddings", None)
    if family != "t5" and positions is not None and max_tokens > positions:
        given = f"{source} takes up to {positions} tokens, not {max_tokens}"
        raise UserError(f"{given}: give --text-max-tokens {positions}")
    return TextEncoder(model, tokenizer, family, max_tokens, source, _fingerprint_files(folder))


@lru_cache(maxsize=1)
def load_trained_encoder(source: str, fingerprint: str, max_tokens: int, device: str) -> TextEncoder:
    """The text encoder that a model was trained with, on a device; the latest one is kept. UserError for another."""
    encoder = load_text_encoder(source, max_tokens)
    if encoder.fingerprint() != fingerprint:
        raise UserError(
            f"{source} is not the text encoder that the model was trained with: its weights or its tokenizer differ"
        )
    return encoder.to(device)


def _find_folder(source: str) -> Path:
    """The folder of an encoder, downloaded where `source` is a name on the hub. UserError when files are missing."""
    try:
        folder = find_checkpoint(source, revision=None, token=None)
    except UserError as error:
        raise UserError(f"{error}; expected {_EXPECTED}") from error
    if not folder.is_dir():
        raise UserError(f"there is no text encoder '{source}': expected {_EXPECTED}")
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if any((folder / name).is_file() for name in _WEIGHTS) else [_WEIGHTS[0]]
    tokenizers = [all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES]
    missing += [] if any(tokenizers) else [_TOKENIZER_FILES[0][0]]
    if missing:
        raise UserError(f"{source} is no text encoder: it lacks {', '.join(missing)}; expected {_EXPECTED}")
    read_json(folder / "config.json")  # transformers would take the second of two equal names
    return folder


@contextmanager
def _hide_reports(transformers: Any) -> Iterator[None]:
    """Without transformers' list of the tensors that are not used: those of the image tower or the decoder."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_tokenizer(transformers: Any, folder: Path, source: str) -> Any:
    """The tokenizer, as transformers chooses it."""
    if not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file():
        import_extra("sentencepiece", f"the tokenizer of {source}")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except ImportError:
        import_extra("sentencepiece", f"the tokenizer of {source}")
        raise


def _fingerprint_files(folder: Path) -> str:
    """A digest of config.json and the tokenizer's files."""
    names = ["config.json", *(name for names in _TOKENIZER_FILES for name in names), *_OTHER_TOKENIZER_FILES]
    present = [(name, (folder / name).read_bytes()) for name in names if (folder / name).is_file()]
    return fingerprint_bytes(repr([(name, fingerprint_bytes(content)) for name, content in present]).encode())
