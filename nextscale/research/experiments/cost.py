"""Cost of models: seconds to sample an image and to train an epoch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nextscale.common.distributed import World
from nextscale.config.log import read_log
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.latency import BatchTimes, time_batch
from nextscale.pipeline import Pipeline

BATCHES = (1, 8)
_ROUNDS = 5
_WARM_UP_STEPS = 3
"""Training steps that are not counted."""


def compute_training_seconds(folder: Path, examples: int) -> float:
    """Seconds of training on this many examples, from the median step of a run that logs every step."""
    rates = [r["images_per_s"] for r in read_log(folder / "log.jsonl") if "images_per_s" in r]
    return examples / statistics.median(rates[_WARM_UP_STEPS:] or rates)


def measure_sampling_seconds(models: Sequence[tuple[Path, SampleConfig]], world: World) -> list[dict[str, float]]:
    """Seconds per image of each model with its settings, decoder included, for each batch size; and of each scale, in
    the largest batch.

    Medians over rounds that time all models, so that a slower machine slows down all of them.
    """
    pipelines = [Pipeline.from_pretrained(str(folder), device=str(world.device)) for folder, _ in models]
    seconds: list[dict[str, float]] = [{} for _ in models]
    for batch in BATCHES:
        times = [BatchTimes() for _ in models]
        for turn in tqdm(range(_ROUNDS + 1), desc=f"sampling, batch {batch}", unit="round"):
            for pipeline, (_, settings), model_times in zip(pipelines, models, times, strict=True):
                scales, decode = time_batch(pipeline, batch, settings)
                if turn:
                    model_times.scales.append(scales)
                    model_times.decode.append(decode)
        for pipeline, model_seconds, model_times in zip(pipelines, seconds, times, strict=True):
            model_seconds[f"seconds_per_image_of_{batch}"] = statistics.median(model_times.totals) / batch
            per_scale = zip(pipeline.config.pyramid.sides, zip(*model_times.scales, strict=True), strict=True)
            model_seconds |= {f"seconds_at_{h}x{w}": statistics.median(column) / batch for (h, w), column in per_scale}
    return seconds
