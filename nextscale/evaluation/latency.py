"""`nextscale bench`: how long a model takes, scale by scale, beside another one where there is one.

Models take turns within a round, so that a machine that becomes slower does so for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from nextscale.common.devices import describe_machine
from nextscale.common.errors import UserError
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.evaluation.peak_memory import peak_memory
from nextscale.info import describe_config
from nextscale.pipeline import Pipeline


@dataclass
class Times:
    """Seconds of each round."""

    scales: list[list[float]] = field(default_factory=list)
    """Per round, of each scale."""
    decode: list[float] = field(default_factory=list)

    def whole(self) -> list[float]:
        """Seconds of whole batches."""
        return [sum(scales) + decode for scales, decode in zip(self.scales, self.decode, strict=True)]


def bench(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str | None],
    rounds: int,
    settings: SampleConfig,
    device: str,
) -> dict[str, Any]:
    """Time sampling of one model, or of two in alternation, over batch sizes and precisions.

    Each case is run once to warm up, then `rounds` times. Raises UserError when a model cannot be loaded.
    """
    if min([*batches, rounds]) < 1:
        raise UserError("--batch-sizes and --rounds must be 1 or more")
    cases: list[dict[str, Any]] = []
    for dtype in dtypes:
        pipelines = [Pipeline.from_pretrained(model, dtype=dtype, device=device) for model in models]
        for batch in batches:
            times = [Times() for _ in models]
            for turn in tqdm(range(rounds + 1), desc=f"{dtype or 'default'} batch {batch}", unit="round"):
                for pipeline, kept in zip(pipelines, times, strict=True):
                    scales, decode = time_batch(pipeline, batch, settings)
                    if turn:
                        kept.scales.append(scales)
                        kept.decode.append(decode)
            for model, pipeline, kept in zip(models, pipelines, times, strict=True):
                memory = peak_memory(model, dtype, batch, settings, pipeline)
                cases.append(_case(model, dtype, pipeline, batch, kept, settings, memory))
            if len(models) == 2:
                ratios = [b / a for a, b in zip(times[0].whole(), times[1].whole(), strict=True)]
                cases[-2]["times_as_fast"] = spread(ratios)
    return {
        "models": list(models),
        "rounds": rounds,
        "sampling": to_dict(settings),
        "machine": describe_machine(pipelines[0].device),
        "cases": cases,
    }


def time_batch(pipeline: Pipeline, batch: int, settings: SampleConfig) -> tuple[list[float], float]:
    """Seconds of each scale and of the decoder, for one batch with the classes in turn."""
    assert pipeline.config.transformer is not None, "a generator has a transformer"
    classes = pipeline.config.transformer.condition.num_classes
    marks = [_now(pipeline.device)]
    canvas = None
    for step in pipeline.sample_scales([i % classes for i in range(batch)], settings):
        canvas = step.canvas_BChw
        marks.append(_now(pipeline.device))
    assert canvas is not None, "a pyramid has a scale"
    with torch.no_grad():
        pipeline.tokenizer.paint(canvas)
    scales = [b - a for a, b in pairwise(marks)]
    return scales, _now(pipeline.device) - marks[-1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _case(
    model: str, dtype: str | None, pipeline: Pipeline, batch: int, times: Times, settings: SampleConfig, memory: int
) -> dict[str, Any]:
    facts = describe_config(model, pipeline.config)
    flops = facts["transformer_flops"] * (2 if settings.guided else 1) + facts["tokenizer_flops"]["decode"]
    seconds = statistics.median(times.whole())
    return {
        "model": model,
        "dtype": str(next(pipeline.transformer.parameters()).dtype).removeprefix("torch."),
        "batch": batch,
        "seconds": spread(times.whole()),
        "seconds_per_image": seconds / batch,
        "images_per_s": batch / seconds,
        "seconds_per_scale": [statistics.median(column) for column in zip(*times.scales, strict=True)],
        "seconds_decoder": statistics.median(times.decode),
        "gflop_per_image": flops / 1e9,
        "gflop_per_s": flops * batch / seconds / 1e9,
        "peak_memory_bytes": memory,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{report['machine']['device']}, {report['machine']['threads']} threads, {report['rounds']} rounds"]
    lines.append(f"{'model':<28}{'dtype':<10}{'batch':>6}{'s/image':>10}{'spread':>16}{'GFLOP/s':>9}{'memory':>12}")
    for case in report["cases"]:
        low, high = (case["seconds"][n] / case["batch"] for n in ("min", "max"))
        lines.append(
            f"{case['model'][-27:]:<28}{case['dtype']:<10}{case['batch']:>6}{case['seconds_per_image']:>10.4f}"
            f"{f'{low:.4f}-{high:.4f}':>16}{case['gflop_per_s']:>9.1f}{case['peak_memory_bytes'] / 2**20:>8.0f} MiB"
        )
        per_scale = " ".join(f"{s / case['batch'] * 1000:.1f}" for s in case["seconds_per_scale"])
        decoder = case["seconds_decoder"] / case["batch"] * 1000
        lines.append(f"    ms per image of each scale: {per_scale}; decoder {decoder:.1f}")
        if "times_as_fast" in case:
            ratio = case["times_as_fast"]
            lines.append(
                f"    {ratio['median']:.2f} times as fast as the other ({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
    return "\n".join(lines)
