"""How a run that trains on images begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.config.data import DataConfig
from nextscale.data.datasets import ImageExamples, open_dataset
from nextscale.data.sources import Source
from nextscale.training.engine.state import check_settings


def open_run(
    folder: Path, settings: dict[str, Any], size: int, images: DataConfig, seed: int, world: World, *,
    accept_changes: bool, about: str = "",
) -> tuple[ImageExamples, ImageExamples, Source]:  # fmt: skip
    """(training, held-out) examples of settings["data"] at `size` x `size`, and their source. Writes `folder`/run.json.

    `about`: what is said of the run beside the number of images; the number of classes, if empty. Raises UserError
    naming what differs from an earlier run's settings, unless `accept_changes`, and as `open_dataset`.
    """
    check_settings(folder, settings, accept_changes)
    data = settings["data"]
    train, held_out, source = open_dataset(data, size, images, seed)
    world.wait()  # all have looked before one writes
    if world.main:
        write_json(folder / "run.json", settings)
        about = about or f"{len(source.class_names)} classes"
        print(f"{data}: {len(train)} images to train on, {len(held_out)} held out; {about}")
    return train, held_out, source
