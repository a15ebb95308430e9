"""`nextscale tokenize`: a data set to a token cache."""

from __future__ import annotations

from pathlib import Path

from nextscale.backends import optimize
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.common.distributed import World
from nextscale.common.files import write_text
from nextscale.config.data import DataConfig
from nextscale.config.parse import to_dict
from nextscale.data.cache import CacheWriter
from nextscale.data.datasets import open_dataset
from nextscale.data.describe import print_data_set
from nextscale.data.examples import Examples
from nextscale.encoders.load import load_encoder


def tokenize(
    data: str, tokenizer_folder: Path, out: Path, images: DataConfig, seed: int, world: World,
    *, views: int = 1, shard: int = 8192, batch: int = 64, encoder: str = "", accept_changes: bool = False,
) -> None:  # fmt: skip
    """Encode training and held-out images of `data` into the cache `out`; resumes what an earlier call began.

    Names of unreadable images go to unreadable.txt. Raises UserError when `out` holds a cache with other settings or
    of data that have changed (unless `accept_changes`), or when more images are unreadable than `images` allows.
    """
    checkpoint = read_checkpoint(tokenizer_folder)
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint, config).to(world.device)
    optimize(tokenizer)
    train, held_out, source = open_dataset(data, config.image_size, images, seed)
    print_data_set(source.class_names, [train.labels_B, held_out.labels_B], train.notes)
    splits: dict[str, Examples] = {"train": train, "held_out": held_out}
    feature_encoder = load_encoder(encoder).to(world.device) if encoder else None
    tokenizer.eval()
    writer = CacheWriter(out, tokenizer, splits, views, shard, images.max_unreadable, feature_encoder)
    if world.main:
        settings = {"data": data, "images": to_dict(images), "seed": seed}
        writer.record_settings(source.class_names, settings, accept_changes)
    world.wait()
    complete = writer.is_complete()
    world.wait()
    writer.write(world.rank, world.size, batch, show=world.main)
    if writer.unreadable:
        write_text(out / f"unreadable-{world.rank}.txt", "".join(f"{n}\n" for n in writer.unreadable))
        print(
            f"note: passed over {len(writer.unreadable)} unreadable images, named in {out}/unreadable-{world.rank}.txt"
        )
    world.wait()
    if world.main:
        counts = f"{len(train)} training and {len(held_out)} held-out images"
        verb = "nothing to write, complete already:" if complete else "wrote"
        print(f"{verb} {out}: {counts}, {config.pyramid.length} tokens each")
