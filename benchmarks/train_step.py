"""Forward and backward of one training step, compared with the official code on equal weights and tokens.

    python -m benchmarks.train_step --official PATH [--model var-d12] [--batch 4] [--rounds 5]

PATH is your clone of FoundationVision/VAR; without it only nextscale is timed. Prints a table and, last, one line of
JSON: seconds, the ratio over alternating runs with its spread, and the differences of loss and gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.official import load_official, rename_tensors
from nextscale.config.presets import preset
from nextscale.info import condition_flops, scale_flops
from nextscale.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="clone of FoundationVision/VAR")
    parser.add_argument("--model", default="var-d12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast, both")
    options = parser.parse_args()

    pipeline = Pipeline.from_config(preset(options.model)).to(options.device, torch.float32)
    model, vocab = pipeline.transformer, pipeline.config.tokenizer.vocab_size
    for parameter in model.parameters():  # initial gammas are nearly 0 and would hide differences
        torch.nn.init.normal_(parameter, std=0.02)
    rng = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(vocab, (options.batch, model.pyramid.length), generator=rng).to(options.device)
    labels_B = torch.randint(1000, (options.batch,), generator=rng).to(options.device)
    inputs_BLC = pipeline.tokenizer.teacher_inputs(tokens_BL)

    def compute_loss(forward: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            logits_BLV = forward()
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), tokens_BL.flatten())

    runs = {"nextscale": (model, lambda: model(labels_B, inputs_BLC).logits_BNV)}
    if options.official:
        _, official = load_official(options.official, pipeline)
        official.to(options.device).cond_drop_rate = 0.0
        runs["official"] = (official, lambda: official(labels_B, inputs_BLC))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses = {}
    for turn in range(options.rounds + 1):
        for name, (module, forward) in runs.items():
            module.zero_grad(set_to_none=True)
            synchronize(options.device)
            began = time.perf_counter()
            loss = compute_loss(forward)
            loss.backward()
            synchronize(options.device)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
            losses[name] = loss.item()
    print_report(options, pipeline, runs, seconds, losses)


def print_report(options: argparse.Namespace, pipeline: Pipeline, runs: dict, seconds: dict, losses: dict) -> None:
    config = pipeline.config
    flops = condition_flops(config.transformer) + sum(scale_flops(config, k) for k in range(len(config.pyramid)))
    result = {
        "model": options.model,
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if options.bf16 else "float32",
        "torch": torch.__version__,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "tflop_per_step": 3 * options.batch * flops / 1e12,
    }
    for name, times in seconds.items():
        rate = result["tflop_per_step"] / statistics.median(times)
        print(f"{name:<10} {statistics.median(times):8.3f} s per step  {options.batch / statistics.median(times):8.2f} "
              f"images/s  {1000 * rate:9.1f} GFLOP/s")  # fmt: skip
    if options.device == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if "official" in runs:
        ratios = [b / a for a, b in zip(seconds["nextscale"], seconds["official"], strict=True)]
        ours = rename_tensors({n: p.grad for n, p in pipeline.transformer.named_parameters()})
        theirs = {n: p.grad for n, p in runs["official"][0].named_parameters()}
        worst = max(
            (float((ours[n] - g).norm() / g.norm().clamp_min(1e-12)), n) for n, g in theirs.items() if g is not None
        )
        result["ratio"] = statistics.median(ratios)
        result["ratio_spread"] = [min(ratios), max(ratios)]
        result["ratio_of_fastest"] = min(seconds["official"]) / min(seconds["nextscale"])
        result["loss_difference"] = abs(losses["nextscale"] - losses["official"])
        result["gradient_difference"] = {"relative": worst[0], "of": worst[1]}
        print(
            f"{result['ratio']:.2f} times as fast as the official code ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"the fastest round of each: {result['ratio_of_fastest']:.2f}); "
            f"losses {losses['nextscale']:.6f} and {losses['official']:.6f}; gradients differ by {worst[0]:.1e} "
            f"({worst[1]})"
        )
    print(json.dumps(result))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
