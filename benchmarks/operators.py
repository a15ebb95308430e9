"""Where the time of a batch of images goes on a CPU: a table of operators and scales beside the machine's limits.

    python -m benchmarks.operators [--model var-d16] [--dtype float32] [--batch 1] [--rounds 3]

MODEL is a preset, with random weights, or a checkpoint. Guidance, top-k 900 and top-p 0.96. torch's profiler times
every operator; a compiled kernel's time is that of the function that calls it. For each part: milliseconds at each
scale, in the decoder and in all, GFLOP/s, and the time that its arithmetic, or where that is longer reading its weights
once, would take at the highest rates that were measured in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from nextscale.backends import keep_freed_memory
from nextscale.backends.cpu.attention import CpuAdaLayerNorm, CpuAttention
from nextscale.backends.cpu.products import can_pack, linear, pack_weight
from nextscale.common.machine import describe_machine
from nextscale.common.precision import find_dtype
from nextscale.config.presets import preset
from nextscale.doctor.models import randomise
from nextscale.pipeline import Pipeline
from nextscale.sampling.sampler import ModelPredictor
from nextscale.tokenizer.tokenizer import Tokenizer

SAMPLING = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
PARTS = ("products", "convolutions", "attention", "adaLN", "other")
DECODER = "decoder"
OUTSIDE = "drawing"
"""Where an operator runs: at a scale of the transformer, in the decoder, or between them (filters, draws, canvas)."""
Times = Counter[tuple[str, str]]
"""(place, part) -> seconds, or operations, or bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d16")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    pipeline = load_pipeline(options.model, options.dtype)
    labels = list(range(options.batch))

    def sample() -> None:
        pipeline.sample(labels, seed=0, batch_size=options.batch, **SAMPLING)

    sample()  # packs weights and builds kernels
    limits = measure_limits(find_dtype(options.dtype))
    rounds = [measure_round(sample, pipeline) for _ in range(options.rounds)]
    seconds = Counter({key: statistics.median(r[0][key] for r in rounds) for key in rounds[0][0]})
    flops, size = rounds[0][1:]
    print_table(seconds, flops, size, limits)
    cells = [
        {"place": place, "part": part, "seconds": s, "flops": flops[place, part], "bytes": size[place, part]}
        for (place, part), s in sorted(seconds.items())
    ]
    about = {"what": "operators", "machine": describe_machine(torch.device("cpu")), **vars(options)}
    print(json.dumps({**about, "limits": limits, "cells": cells}))


def load_pipeline(model: str, dtype: str) -> Pipeline:
    """A checkpoint, or a preset with random weights, optimised."""
    if Path(model).is_dir():
        return Pipeline.from_pretrained(model, dtype=dtype)
    pipeline = Pipeline.from_config(preset(model), backend="plain")
    randomise(pipeline)
    return pipeline.to("cpu", find_dtype(dtype)).optimize()


# ---- what the machine can do


def measure_limits(dtype: torch.dtype) -> dict[str, float]:
    """The fastest of some products and convolutions in GFLOP/s, and the reading of a large array in GB/s."""
    products = [_time_product(rows, *shape, dtype) for rows in (512, 2048) for shape in ((1024, 4096), (4096, 1024))]
    x, weight = torch.randn(1, 320, 64, 64, dtype=dtype), torch.randn(320, 320, 3, 3, dtype=dtype)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    convolve = functools.partial(torch.nn.functional.conv2d, x, weight, padding=1)
    large = torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    return {
        "products": max(products),
        "convolutions": 2 * 64 * 64 * 320 * 320 * 9 / time_best(convolve) / 1e9,
        "read": large.numel() * 8 / time_best(large.sum) / 1e9,
    }


def _time_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    packed = pack_weight(weight) if can_pack(weight) else weight
    return 2 * rows * inputs * outputs / time_best(lambda: linear(x, packed)) / 1e9


@torch.inference_mode()
def time_best(run: Callable[[], object], rounds: int = 15) -> float:
    """The shortest time of some runs, in seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


# ---- one batch under the profiler


def measure_round(sample: Callable[[], None], pipeline: Pipeline) -> tuple[Times, Times, Times]:
    """Seconds, operations and bytes of weights of one batch."""
    with ExitStack() as stack:
        stack.enter_context(marked(ModelPredictor, "__call__", lambda arguments: f"scale {arguments[2]}"))
        stack.enter_context(marked(Tokenizer, "decode_canvas", lambda _: DECODER))
        stack.enter_context(marked(CpuAttention, "mix", lambda arguments: _describe_attention(*arguments[1:3])))
        stack.enter_context(marked(CpuAdaLayerNorm, "forward", lambda _: "adaLN"))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
        with record_function(OUTSIDE):
            sample()
    seconds, flops, size = Times(), Times(), Times()
    for event in profiler.events():
        names = list(list_names(event))
        place = next((_name_place(n, pipeline) for n in names if n.startswith(("scale ", DECODER))), OUTSIDE)
        part = name_part(names)
        seconds[place, part] += event.self_cpu_time_total / 1e6
        if event.name.startswith("attention "):
            flops[place, part] += int(event.name.split()[1])
        elif names[0] in _COUNTED and not any(n in _COUNTED for n in names[1:]):
            flops[place, part] += count_flops(event.input_shapes)
            size[place, part] += math.prod(event.input_shapes[1]) * pipeline.dtype.itemsize
    return seconds, flops, size


@contextmanager
def marked(owner: type, method: str, name: Callable[[Any], str]) -> Iterator[None]:
    """Calls of a method stand in the profile under a name that is made of their arguments."""
    run = getattr(owner, method)

    @functools.wraps(run)
    def run_marked(*arguments: Any, **options: Any) -> Any:
        with record_function(name(arguments)):
            return run(*arguments, **options)

    setattr(owner, method, run_marked)
    try:
        yield
    finally:
        setattr(owner, method, run)


def _describe_attention(qkv_BN3Hd: Tensor, context: Any) -> str:
    """A name with the operations of both products of attention, for queries of a scale and all keys up to its end."""
    B, N, _, H, d = qkv_BN3Hd.shape
    return f"attention {4 * B * N * context.span[1] * H * d}"


def list_names(event: Any) -> Iterator[str]:
    """The name of an event and those of what it ran in, from the inside out."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _name_place(name: str, pipeline: Pipeline) -> str:
    if name == DECODER:
        return name
    height, width = pipeline.config.pyramid.sides[int(name.split()[1])]
    return f"{height}x{width}"


_PRODUCTS = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "onednn::qlinear_pointwise")
_CONVOLUTIONS = (
    "aten::_nnpack_spatial_convolution", "aten::mkldnn_convolution", "mkldnn::_convolution_pointwise",
    "aten::slow_conv2d_forward",
)  # fmt: skip
_COUNTED = (*_PRODUCTS, *_CONVOLUTIONS)


def name_part(names: list[str]) -> str:
    """The part that an operator belongs to, by its name and those of what it ran in."""
    if any(n.startswith("attention ") for n in names):
        return "attention"
    if "adaLN" in names:
        return "adaLN"
    if any(n in _PRODUCTS for n in names):
        return "products"
    return "convolutions" if any(n in _CONVOLUTIONS for n in names) else "other"


def count_flops(shapes: list[list[int]]) -> int:
    """Of a product of rows (.., in) with a weight (out, in) or (in, out), or of a convolution that keeps the size."""
    x, weight = shapes[:2]
    if len(x) == 4:
        return 2 * x[0] * x[2] * x[3] * math.prod(weight)
    return 2 * math.prod(x) * math.prod(weight) // x[-1]


# ---- the table


def print_table(seconds: Times, flops: Times, size: Times, limits: dict[str, float]) -> None:
    """A line for each place, a column of milliseconds for each part."""
    places = list(dict.fromkeys(place for place, _ in seconds))
    places.sort(key=lambda place: (place == OUTSIDE, place == DECODER, int(place.split("x")[0]) if "x" in place else 0))
    rates = f"{limits['products']:.0f} in products, {limits['convolutions']:.0f} in convolutions"
    print(f"Highest rates: {rates} (GFLOP/s), {limits['read']:.0f} GB/s in reading")
    print(
        f"{'ms':>12}"
        + "".join(f"{part:>14}" for part in PARTS)
        + f"{'all':>10}{'products GFLOP/s':>18}{'limit, ms':>11}"
    )
    for place in places:
        cells = [1000 * seconds[place, part] for part in PARTS]
        rate = flops[place, "products"] / max(seconds[place, "products"], 1e-9) / 1e9
        limit = 1000 * sum(find_limit(part, flops[place, part], size[place, part], limits) for part in PARTS)
        print(
            f"{place:>12}" + "".join(f"{ms:>14.1f}" for ms in cells) + f"{sum(cells):>10.1f}{rate:>18.0f}{limit:>11.1f}"
        )
    sums = [sum(1000 * s for (_, p), s in seconds.items() if p == part) for part in PARTS]
    limit = 1000 * sum(find_limit(part, flops[place, part], size[place, part], limits) for place, part in seconds)
    print(f"{'all':>12}" + "".join(f"{ms:>14.1f}" for ms in sums) + f"{sum(sums):>10.1f}{'':>18}{limit:>11.1f}")


def find_limit(part: str, flops: float, size: float, limits: dict[str, float]) -> float:
    """Seconds that the arithmetic takes at the highest rate, or reading the weights once where that is longer."""
    rate = limits["convolutions" if part == "convolutions" else "products"]
    return max(flops / rate, size / limits["read"]) / 1e9


if __name__ == "__main__":
    main()
