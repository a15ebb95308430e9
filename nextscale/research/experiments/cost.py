"""What models cost side by side: seconds to sample an image and to train an epoch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.latency import time_batch
from nextscale.pipeline import Pipeline
from nextscale.training.engine.log import read_log

BATCHES = (1, 8)
_ROUNDS, _SETTLED = 5, 3  # training steps before this one are not counted


def training_seconds(folder: Path, examples: int) -> float:
    """Seconds that a training in `folder`, logged at every step, takes for this many examples: the median step's."""
    rates = [r["images_per_s"] for r in read_log(folder / "log.jsonl") if "images_per_s" in r]
    return examples / statistics.median(rates[_SETTLED:] or rates)


def sampling_seconds(folders: Sequence[Path], settings: SampleConfig, world: World) -> list[dict[str, float]]:
    """Seconds per image of each model, with its decoder, alone and in a batch: the median of rounds in which they take
    turns, so that a machine that becomes slower does so for all."""
    pipelines = [Pipeline.from_pretrained(str(folder), device=str(world.device)) for folder in folders]
    found: list[dict[str, float]] = [{} for _ in folders]
    for batch in BATCHES:
        times: list[list[float]] = [[] for _ in folders]
        for turn in tqdm(range(_ROUNDS + 1), desc=f"sampling, batch {batch}", unit="round"):
            for pipeline, kept in zip(pipelines, times, strict=True):
                scales, decode = time_batch(pipeline, batch, settings)
                if turn:
                    kept.append((sum(scales) + decode) / batch)
        for figures, kept in zip(found, times, strict=True):
            figures[f"seconds_per_image_of_{batch}"] = statistics.median(kept)
    return found
