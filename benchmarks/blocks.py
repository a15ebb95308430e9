"""Attention and adaLN of a block on a CPU: the compiled kernels compared with PyTorch's operators.

    python -m benchmarks.blocks [--model var-d16] [--batch 1] [--rounds 15]

MODEL is a preset or a checkpoint; weights are random, which does not change the times. With guidance there are two
sequences per image. Attention includes everything between the two projections: normalisation, cache, softmax, values.
Prints a line for each scale; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dynamic import time_alternately
from nextscale.backends import keep_freed_memory, optimize
from nextscale.backends.cpu.kernels.blocks import modulate
from nextscale.checkpoints.native import read_config
from nextscale.common.errors import UserError
from nextscale.common.machine import describe_machine
from nextscale.config.model import ModelConfig
from nextscale.config.presets import preset
from nextscale.evaluation.latency import summarize_spread
from nextscale.transformer.attention import Attention
from nextscale.transformer.block import AdaLayerNorm
from nextscale.transformer.context import ScaleContext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    path = Path(options.model)
    config = read_config(path)[0] if path.is_dir() else preset(options.model)
    names = f"{'operators':>11}{'kernel':>8}{'times':>7}"
    print(f"{'':>6}{'attention, ms':>26}{'adaLN, ms':>26}\n{'scale':>6}{names}{names}")
    scales = [_time_scale(config, k, 2 * options.batch, options.rounds) for k in range(len(config.pyramid))]
    report = {"what": "blocks", "machine": describe_machine(torch.device("cpu")), "model": options.model,
              "batch": options.batch, "rounds": options.rounds, "scales": scales}  # fmt: skip
    print(json.dumps(report))


@torch.inference_mode()
def _time_scale(config: ModelConfig, k: int, sequences: int, rounds: int) -> dict[str, Any]:
    model, pyramid = config.transformer, config.pyramid
    assert model is not None, "a tokenizer alone has no blocks"
    attention, norm = optimize(nn.ModuleList([Attention(model), AdaLayerNorm(model.norm_eps)]))
    count = pyramid.counts[k]
    qkv = torch.randn(sequences, count, 3, model.heads, model.width // model.heads)
    cache = attention.new_state(sequences, pyramid.spans[-1][0])
    cache.k_BHLd.normal_()
    cache.v_BHLd.normal_()
    context = ScaleContext(pyramid, pyramid.spans[k], k=k)
    x, adaln = torch.randn(sequences, count, model.width), torch.randn(sequences, 3, 2, model.width)
    scale, shift = (adaln[:, i, 1].unsqueeze(1) for i in (1, 2))
    if attention.mix_by_kernel(qkv, context, cache) is None:
        raise UserError("no kernel can be used: see nextscale/backends/cpu/kernels/build.py")
    layers = {
        "attention": _time_pair(
            lambda: Attention.mix(attention, qkv, context, cache),
            lambda: attention.mix_by_kernel(qkv, context, cache),
            rounds,
        ),
        "adaln": _time_pair(
            lambda: AdaLayerNorm.forward(norm, x, scale, shift), lambda: modulate(x, scale, shift, norm.eps), rounds
        ),
    }
    side = pyramid.sides[k][0]
    columns = ""
    for times in layers.values():
        operators, kernel = (1000 * times[name]["median"] for name in ("operators", "kernel"))
        columns += f"{operators:>11.3f}{kernel:>8.3f}{times['ratio']['median']:>7.2f}"
    print(f"{side:>6}{columns}", flush=True)
    return {"side": side, **layers}


def _time_pair(
    operators: Callable[[], Tensor | None], kernel: Callable[[], Tensor | None], rounds: int
) -> dict[str, Any]:
    """Seconds of both, timed alternately, and the speedup of the kernel."""
    times = time_alternately({"operators": operators, "kernel": kernel}, rounds, time.perf_counter)
    ratios = [a / b for a, b in zip(times["operators"], times["kernel"], strict=True)]
    return {**{name: summarize_spread(seconds) for name, seconds in times.items()}, "ratio": summarize_spread(ratios)}


if __name__ == "__main__":
    main()
