"""What a caller gives for each image (labels, prompts, pictures, vectors) as a batch of the model's condition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.notes import print_note
from nextscale.config.condition import ConditionConfig
from nextscale.config.labels import index_labels, list_labels
from nextscale.data.arrays import Picture, find_size, list_pictures

if TYPE_CHECKING:
    from nextscale.config.sampling import SampleConfig
    from nextscale.pipeline import Pipeline

KEYWORDS = {"text": "prompts", "picture": "control", "vector": "vectors"}
"""The keyword of `Pipeline.sample` for a kind of condition; labels for classes and for kinds of your own."""

Read = tuple[Any, Any, tuple[str, ...]]
"""Values of the model's condition, those of the negative prompts or None, and a caption for each."""


def read_condition(pipeline: Pipeline, labels: Any, given: Mapping[str, Any], settings: SampleConfig | None) -> Read:
    """What is given for each image, None for nothing; one value, or one for each image.

    `given`: values by the keywords of `GIVEN`. Of a combined condition with several parts of a kind a keyword takes a
    table, part: values. UserError for what the model's condition does not have, for another shape or number, and for
    negative prompts without guidance.
    """
    config, condition = pipeline.transformer.config.condition, pipeline.transformer.condition
    negative = given.get("negative_prompts")
    rows = _read_rows(pipeline, config, {"labels": labels} | {n: given[n] for n in KEYWORDS.values() if n in given})
    if not rows:
        names = sorted({_get_keyword(part) for part in config.list_parts().values()})
        raise UserError(f"this model's images are conditioned on {config.describe()}: give {' or '.join(names)}")
    count = max(map(len, rows.values()))
    rows = {name: _repeat(values, count, config.list_parts()[name]) for name, values in rows.items()}
    if negative is not None and settings is not None and not settings.guided:
        raise UserError("negative prompts have no effect without guidance: set cfg above 0")
    values = condition.parse(_join_parts(pipeline, config, rows))
    words = zip(*_list_captions(pipeline, config, rows), strict=True)
    captions = tuple(", ".join(filter(None, parts)) for parts in words)
    return values, _read_negative(pipeline, negative, count), captions


def _read_rows(pipeline: Pipeline, config: ConditionConfig, given: dict[str, Any]) -> dict[str, list[Any]]:
    """For each part that something is given for a list of its values."""
    rows: dict[str, list[Any]] = {}
    for keyword, value in given.items():
        names = [name for name, part in config.list_parts().items() if _get_keyword(part) == keyword]
        if value is None:
            continue
        if not names:
            known = sorted({_get_keyword(part) for part in config.list_parts().values()})
            raise UserError(
                f"this model takes no {keyword}: its images are conditioned on {config.describe()}; give "
                f"{' or '.join(known)}"
            )
        if not isinstance(value, Mapping):
            if len(names) > 1:
                raise UserError(f"{keyword} must be a table of values for {' and '.join(names)}")
            value = {names[0]: value}
        unknown = [name for name in value if name not in names]
        if unknown:
            raise UserError(f"the condition has no part '{unknown[0]}' that takes {keyword}; it has {', '.join(names)}")
        rows |= {name: _list_values(pipeline, config.list_parts()[name], entry) for name, entry in value.items()}
    return rows


def _get_keyword(part: ConditionConfig) -> str:
    return KEYWORDS.get(part.kind, "labels")


def _list_values(pipeline: Pipeline, part: ConditionConfig, value: Any) -> list[Any]:
    """The values of a part as its `parse` takes them; of texts as they are."""
    if part.kind == "text":
        return [value] if isinstance(value, str) else list_labels(value)
    if part.kind == "picture":
        return read_control(value, part)
    if part.kind == "vector":
        entries = torch.as_tensor(value) if isinstance(value, np.ndarray | Tensor) else list(value)
        single = entries.ndim == 1 if isinstance(entries, Tensor) else not _holds_lists(entries)
        return [entries] if single else list(entries)
    if part.kind == "class":
        names = pipeline.config.class_names if part.takes_labels else ()
        return list(index_labels(value, names, part.num_classes))
    return list_labels(value)


def _holds_lists(entries: list[Any]) -> bool:
    return any(entry is None or isinstance(entry, Iterable) for entry in entries)


def read_control(value: Any, part: ConditionConfig) -> list[Tensor | None]:
    """Control pictures as float32 (C, H, W) with values in 0 to 1: paths, PIL pictures or arrays, None for no picture.

    UserError for a picture of another size than the model's: it would not lie over the image.
    """
    height, width = part.picture_size
    entries = list(value) if isinstance(value, list | tuple) else [value]
    pictures: list[Tensor | None] = []
    for entry in entries:
        found = [None] if entry is None else list_pictures(entry, (height, width))[0]
        pictures += [None if picture is None else _read_picture(picture, part) for picture in found]
    return pictures


def _read_picture(picture: Picture, part: ConditionConfig) -> Tensor:
    height, width = part.picture_size
    if find_size(picture) != (height, width):
        h, w = find_size(picture)
        raise UserError(f"a control picture of this model is {width} x {height} pixels; got one of {w} x {h}")
    if part.picture_channels == 1 and not isinstance(picture, np.ndarray):
        picture = picture.convert("L")
    pixels = np.asarray(picture)
    values = torch.from_numpy(pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1))
    values_CHW = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
    return values_CHW[: part.picture_channels].contiguous()


def _repeat(values: list[Any], count: int, part: ConditionConfig) -> list[Any]:
    """One value for all images, or one for each."""
    if len(values) not in (1, count) or not values:
        raise UserError(f"{_get_keyword(part)} has {len(values)} values, for {count} images")
    return values * count if len(values) == 1 else values


def _join_parts(pipeline: Pipeline, config: ConditionConfig, rows: dict[str, list[Any]]) -> Any:
    """What the condition's `parse` takes."""
    ready = dict(rows)
    for name, part in config.list_parts().items():
        if name in rows and part.kind == "text":
            ready[name] = _read_texts(pipeline, part, rows[name])
    return ready if config.kind == "combined" else next(iter(ready.values()))


def _read_texts(pipeline: Pipeline, part: ConditionConfig, texts: list[str | None]) -> Any:
    """Texts, or what a frozen encoder makes of them. Says which our own encoder cuts."""
    if part.embedding_width:
        return _encode_texts(pipeline, part, [text or "" for text in texts])
    limit = part.max_tokens - 1
    long = [text for text in texts if isinstance(text, str) and len(text.encode()) > limit]
    if long:
        print_note("prompts", f"{len(long)} of {len(texts)} prompts are longer than {limit} bytes and were cut")
    return texts


def _encode_texts(pipeline: Pipeline, part: ConditionConfig, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, E) of texts by the frozen encoder that the model was trained with, and lengths (B,)."""
    if not part.encoder:
        raise UserError("this model reads texts through a frozen text encoder, and its settings do not say which one")
    from nextscale.encoders.text import load_trained_encoder

    encoder = load_trained_encoder(part.encoder, part.encoder_fingerprint, part.max_tokens - 1, str(pipeline.device))
    long = encoder.list_truncated(texts)
    if long:
        print_note("prompts", f"{len(long)} of {len(texts)} prompts have more than {encoder.max_tokens} tokens: cut")
    batch = encoder.encode_batch(texts)
    return batch.text_BTE, batch.length_B


def _read_negative(pipeline: Pipeline, prompts: Any, count: int) -> Any:
    """The values that guidance leads away from; None without negative prompts."""
    if prompts is None:
        return None
    config, condition = pipeline.transformer.config.condition, pipeline.transformer.condition
    names = [name for name, part in config.list_parts().items() if part.kind == "text"]
    if not names:
        raise UserError(f"negative prompts are for a model that reads texts; this one takes {config.describe()}")
    texts = [prompts] if isinstance(prompts, str) else list_labels(prompts)
    rows = {name: _repeat(texts, count, config.list_parts()[name]) for name in names}
    return condition.parse(_join_parts(pipeline, config, rows))


def _list_captions(pipeline: Pipeline, config: ConditionConfig, rows: dict[str, list[Any]]) -> list[list[str]]:
    """For each part the words for its values: texts and classes have some."""
    captions = []
    for name, values in rows.items():
        part = config.list_parts()[name]
        if part.kind == "class":
            words = [pipeline.caption(value) if part.takes_labels else str(value) for value in values]
        else:
            words = [value if isinstance(value, str) else "" for value in values]
        captions.append(words)
    return captions
