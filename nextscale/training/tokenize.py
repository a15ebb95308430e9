"""`nextscale tokenize`: a data set to a token cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nextscale.backends import optimize
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_text
from nextscale.config.data import DataConfig
from nextscale.config.parse import to_dict
from nextscale.data.cache_writer import CacheWriter
from nextscale.data.captions import list_caption_notes
from nextscale.data.datasets import ImageExamples, open_dataset
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Examples
from nextscale.data.sizes import find_size_folder, keep_nearest
from nextscale.encoders.load import load_encoder
from nextscale.encoders.text import TextEncoder, load_text_encoder
from nextscale.pyramid import Pyramid


def tokenize(
    data: str, tokenizer_folder: Path, out: Path, images: DataConfig, seed: int, world: World,
    *, views: int = 1, shard: int = 8192, batch: int = 64, encoder: str = "", accept_changes: bool = False,
    captions: bool = False, text_encoder: str = "", text_max_tokens: int = 64, sizes: Sequence[Pyramid] = (),
    control: Sequence[str] = (),
) -> None:  # fmt: skip
    """Encode training and held-out images of `data` into the cache `out`; resumes what an earlier call began.

    `captions`: store them, too. `text_encoder`: store them and its embeddings of up to `text_max_tokens` tokens.
    `control`: the kinds of control pictures to store, edges or low-resolution, of the same crops as the tokens.
    `sizes`: other pyramids than the tokenizer's, which get caches inside of `out` (`find_size_folder`).
    Names of unreadable images go to unreadable.txt. Raises UserError when `out` holds a cache with other settings or of
    data that have changed (unless `accept_changes`), when more images are unreadable than `images` allows, or when
    captions are asked for and there are none.
    """
    checkpoint = read_checkpoint(tokenizer_folder)
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint, config).to(world.device)
    optimize(tokenizer)
    frozen_text = load_text_encoder(text_encoder, text_max_tokens).to(world.device) if text_encoder else None
    captioned = captions or frozen_text is not None
    feature_encoder = load_encoder(encoder).to(world.device) if encoder else None
    tokenizer.eval()
    if config.pyramid in sizes:
        raise UserError(f"--sizes {config.pyramid}: these are the tokenizer's own scales, which are encoded anyway")
    pyramids = [config.pyramid, *sizes]
    shapes = [replace(config, pyramid=pyramid).image_size for pyramid in pyramids]
    for pyramid, size in zip(pyramids, shapes, strict=True):
        keep = keep_nearest(size, shapes)
        train, held_out, source = open_dataset(data, size, images, seed, captioned=captioned, keep=keep)
        text_notes = _list_text_notes([train, held_out], frozen_text) if captioned and world.main else ()
        print_data_set(source.class_names, [train.labels_B, held_out.labels_B], [*train.notes, *text_notes])
        folder = out if pyramid == config.pyramid else find_size_folder(out, pyramid)
        splits: dict[str, Examples] = {"train": train, "held_out": held_out}
        writer = CacheWriter(
            folder,
            tokenizer.at(pyramid),
            splits,
            views,
            shard,
            images.max_unreadable,
            feature_encoder,
            frozen_text,
            control,
        )
        settings = {"data": data, "images": to_dict(images), "seed": seed}
        _write(writer, source.class_names, settings, batch, world, accept_changes=accept_changes)


def _write(
    writer: CacheWriter, class_names: tuple[str, ...], settings: dict[str, Any], batch: int, world: World, *,
    accept_changes: bool,
) -> None:  # fmt: skip
    """Record the settings of one cache, and write what it lacks."""
    folder, splits = writer.folder, writer.splits
    if world.main:
        writer.record_settings(class_names, settings, accept_changes)
    world.wait()
    complete = writer.is_complete()
    world.wait()
    writer.write(world.rank, world.size, batch, show=world.main)
    if writer.unreadable:
        path = folder / f"unreadable-{world.rank}.txt"
        write_text(path, "".join(f"{n}\n" for n in writer.unreadable))
        print(f"note: passed over {len(writer.unreadable)} unreadable images, named in {path}")
    world.wait()
    if world.main:
        counts = f"{len(splits['train'])} training and {len(splits['held_out'])} held-out images"
        verb = "nothing to write, complete already:" if complete else "wrote"
        print(f"{verb} {folder}: {counts}, {writer.tokenizer.pyramid.length} tokens each")


def _list_text_notes(parts: Sequence[ImageExamples], encoder: TextEncoder | None) -> list[str]:
    """How many captions there are, and how many have more tokens than the encoder is given."""
    captions = [part.captions for part in parts if part.captions is not None]
    lengths = [torch.from_numpy(part.length_C) for part in captions]
    notes = list_caption_notes(lengths, sum(map(len, captions)))
    if encoder is not None:
        counts = Counter(text for part in captions for i in range(len(part)) for text in part[i] if text)
        long = sum(counts[text] for text in encoder.list_truncated(list(counts)))
        verb = f"{long} of {counts.total()} captions have more than {encoder.max_tokens} tokens: they are cut"
        notes += [verb] if long else []
    return notes
