"""The matrix products of a training step on a CPU: PyTorch's and oneDNN's, forward and backward.

`products.trains_by_onednn` says which of them training uses.

    python -m benchmarks.products [--model var-d12] [--width 64] [--batch 4] [--rounds 9]

Weights of fewer than `products._PRODUCT_VALUES` values are PyTorch's in training; --width is for measuring that.

Prints GFLOP/s (median of alternating rounds, the best in parentheses) and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.backends.cpu import products
from nextscale.common.machine import describe_machine
from nextscale.config.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d12")
    parser.add_argument("--width", type=int, help="in place of the model's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    taken, products.trains_by_onednn = products.trains_by_onednn, products.has_onednn
    least, products._PRODUCT_VALUES = products._PRODUCT_VALUES, 0
    config = preset(options.model)
    model = config.transformer
    assert model is not None, "presets of generators have a transformer"
    if options.width:
        model = replace(model, width=options.width, heads=1)
    rows, D = options.batch * config.pyramid.length, model.width
    shapes = {
        "qkv": (D, 3 * D, model.depth),
        "proj": (D, D, model.depth),
        "fc1": (D, model.ffn_width, model.depth),
        "fc2": (model.ffn_width, D, model.depth),
        "head": (D, config.tokenizer.vocab_size, 1),
    }
    result: dict = {
        "model": options.model,
        "rows": rows,
        "machine": describe_machine(torch.device("cpu")),
        "taken": f"oneDNN from {least} values on" if taken else "torch",
        "gflop_s": {},
    }
    seconds = {"torch": 0.0, "oneDNN": 0.0}
    print(f"{rows} rows; GFLOP/s     torch forward   backward        oneDNN forward   backward")
    for name, (width, out, count) in shapes.items():
        times = time_products(rows, width, out, options.rounds)
        gflop = 2 * rows * width * out / 1e9
        rates = {k: (f * gflop / statistics.median(v), f * gflop / min(v)) for k, (f, v) in times.items()}
        result["gflop_s"][name] = rates
        for who in seconds:
            seconds[who] += count * sum(statistics.median(times[f"{who} {way}"][1]) for way in ("forward", "backward"))
        print(f"{name:<6}{width:>6} to {out:<6}" + "".join(f"{m:>9.0f} ({b:.0f})" for m, b in rates.values()))
    result["seconds_per_step"] = seconds
    print(f"all products of a step: torch {seconds['torch']:.2f} s, oneDNN {seconds['oneDNN']:.2f} s, "
          f"{seconds['torch'] / seconds['oneDNN']:.2f} times as fast")  # fmt: skip
    print(json.dumps(result))


def time_products(rows: int, width: int, out: int, rounds: int) -> dict[str, tuple[int, list[float]]]:
    """For each library and direction the number of products, and the seconds of each round."""
    x = torch.randn(rows, width, requires_grad=True)
    weight, bias = torch.randn(out, width, requires_grad=True), torch.randn(out, requires_grad=True)
    gradient = torch.randn(rows, out)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"torch": F.linear, "oneDNN": products.linear}
    times: dict[str, tuple[int, list[float]]] = {
        f"{who} {way}": (products, []) for who in ways for way, products in (("forward", 1), ("backward", 2))
    }
    for turn in range(rounds + 1):
        for who, product in ways.items():
            began = time.perf_counter()
            y = product(x, weight, bias)
            between = time.perf_counter()
            torch.autograd.grad(y, (x, weight, bias), gradient)
            ended = time.perf_counter()
            if turn:  # the first one warms up
                times[f"{who} forward"][1].append(between - began)
                times[f"{who} backward"][1].append(ended - between)
    return times


if __name__ == "__main__":
    main()
