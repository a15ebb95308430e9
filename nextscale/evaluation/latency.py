"""`nextscale bench`: the time that a model takes at each scale, optionally compared with a second model.

Both models are timed in every round, so that a slower machine slows down both. FLOPs are those that the warm-up round
executed: every round samples the same images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from nextscale.common.devices import synchronize
from nextscale.common.errors import UserError
from nextscale.common.machine import describe_machine
from nextscale.common.precision import get_name
from nextscale.config.parse import to_dict
from nextscale.config.sampling import Capture, SampleConfig
from nextscale.evaluation.flops import FlopCounter
from nextscale.evaluation.peak_memory import measure_peak_memory
from nextscale.info import describe_config
from nextscale.pipeline import Pipeline

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""wall: the time that passes. processor: the time of the process on a CPU, which other processes do not change."""


@dataclass
class BatchTimes:
    """Seconds of a batch in each round."""

    scales: list[list[float]] = field(default_factory=list)
    """Of each scale, by round."""
    decode: list[float] = field(default_factory=list)
    """Of the decoder, by round."""

    @property
    def totals(self) -> list[float]:
        """Seconds of the whole batch, by round."""
        return [sum(scales) + decode for scales, decode in zip(self.scales, self.decode, strict=True)]


def compare_models(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    settings: SampleConfig,
    device: str,
    capture: Capture = "auto",
) -> dict[str, Any]:
    """Time sampling of one model, or of two in alternation, for each batch size and dtype.

    Each case runs once to warm up and to count FLOPs, without graphs; where graphs may be captured, three times more;
    and then `rounds` times. Raises UserError when a model cannot be loaded.
    """
    if min([*batches, rounds]) < 1:
        raise UserError("--batch-sizes and --rounds must be 1 or more")
    cases: list[dict[str, Any]] = []
    for dtype in dtypes:
        pipelines = [Pipeline.from_pretrained(model, dtype=dtype, device=device, capture=capture) for model in models]
        for model, pipeline in zip(models, pipelines, strict=True):
            if pipeline.config.transformer is None:
                raise UserError(f"{model} is a tokenizer alone, which cannot sample: give a model with a transformer")
        for batch in batches:
            times = [BatchTimes() for _ in models]
            counters = [FlopCounter(pipeline, settings, batch) for pipeline in pipelines]
            graphs = capture != "off" and pipelines[0].device.type == "cuda"
            for turn in tqdm(range(-3 if graphs else 0, rounds + 1), desc=f"{dtype} batch {batch}", unit="round"):
                for pipeline, counter, model_times in zip(pipelines, counters, times, strict=True):
                    pipeline.capture(capture if turn else "off")  # captured steps have no records to count
                    scales, decode = time_batch(pipeline, batch, settings, None if turn else counter)
                    if turn > 0:
                        model_times.scales.append(scales)
                        model_times.decode.append(decode)
            for model, pipeline, counter, model_times in zip(models, pipelines, counters, times, strict=True):
                memory = measure_peak_memory(model, dtype, batch, settings, pipeline)
                cases.append(_report_case(model, pipeline, batch, model_times, counter.flops, memory))
            if len(models) == 2:
                ratios = [b / a for a, b in zip(times[0].totals, times[1].totals, strict=True)]
                cases[-2]["times_as_fast"] = summarize_spread(ratios)
    return {
        "models": list(models),
        "rounds": rounds,
        "sampling": to_dict(settings),
        "machine": describe_machine(pipelines[0].device),
        "cases": cases,
    }


def time_batch(
    pipeline: Pipeline, batch: int, settings: SampleConfig, counter: FlopCounter | None = None, clock: str = "wall",
    given: Mapping[str, Any] | None = None,
) -> tuple[list[float], float]:  # fmt: skip
    """Seconds of each scale and of the decoder for one batch.

    `given`: keywords of `Pipeline.sample` for its images; without them they have the classes in turn. `counter` counts
    the FLOPs of its steps, which takes time: for a round that is not timed. `clock`: one of `CLOCKS`.
    """
    given = given or give_classes(pipeline, batch, "measuring time draws images")
    times = [_read_clock(pipeline.device, clock)]
    canvas = None
    for step in pipeline.sample_scales(config=settings, records=counter is not None, **given):
        canvas = step.canvas_BChw
        times.append(_read_clock(pipeline.device, clock))
        if counter is not None:
            counter.add(step)
    assert canvas is not None, "a pyramid has a scale"
    with torch.no_grad():
        pipeline.tokenizer.decode_canvas(canvas)
    scales = [b - a for a, b in pairwise(times)]
    return scales, _read_clock(pipeline.device, clock) - times[-1]


def give_classes(pipeline: Pipeline, count: int, purpose: str) -> dict[str, Any]:
    """Keywords of `Pipeline.sample` for so many images of all classes in turn. UserError where there are none."""
    classes = pipeline.transformer.config.condition.require_classes(purpose)
    return {"labels": [i % classes for i in range(count)]}


def _read_clock(device: torch.device, clock: str) -> float:
    synchronize(device)
    return CLOCKS[clock]()


def _report_case(
    model: str, pipeline: Pipeline, batch: int, times: BatchTimes, transformer_flops: int, memory: int
) -> dict[str, Any]:
    """`transformer_flops`: those that the batch executed."""
    decoder = describe_config(model, pipeline.config)["tokenizer_flops"]["decode"]
    flops = transformer_flops / batch + decoder
    seconds = statistics.median(times.totals)
    return {
        "model": model,
        "dtype": get_name(pipeline.dtype),
        "batch": batch,
        "seconds": summarize_spread(times.totals),
        "seconds_per_image": seconds / batch,
        "images_per_s": batch / seconds,
        "seconds_per_scale": [statistics.median(column) for column in zip(*times.scales, strict=True)],
        "seconds_decoder": statistics.median(times.decode),
        "gflop_per_image": flops / 1e9,
        "gflop_decoder": decoder / 1e9,
        "gflop_per_s": flops * batch / seconds / 1e9,
        "peak_memory_bytes": memory,
    }


def summarize_spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_comparison(report: dict[str, Any]) -> str:
    """The report of `compare_models` as a table."""
    lines = [f"{report['machine']['device']}, {report['machine']['threads']} threads, {report['rounds']} rounds"]
    lines.append(
        f"{'model':<28}{'dtype':<10}{'batch':>6}{'s/image':>10}{'spread':>16}"
        f"{'GFLOP/image':>13}{'GFLOP/s':>9}{'memory':>12}"
    )
    for case in report["cases"]:
        low, high = (case["seconds"][n] / case["batch"] for n in ("min", "max"))
        lines.append(
            f"{case['model'][-27:]:<28}{case['dtype']:<10}{case['batch']:>6}{case['seconds_per_image']:>10.4f}"
            f"{f'{low:.4f}-{high:.4f}':>16}{case['gflop_per_image']:>13.4g}{case['gflop_per_s']:>9.1f}"
            f"{case['peak_memory_bytes'] / 2**20:>8.0f} MiB"
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
