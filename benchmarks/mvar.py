"""M-VAR: the time saved by its recurrent state, the cost of its scan in training, and growth with the image size.

    python -m benchmarks.mvar generation [--depth 4] [--width 512] [--image 256 512] [--rounds 5] [--threads 2]
    python -m benchmarks.mvar training [--width 512] [--batch 2] [--rounds 5]      # needs transformers
    python -m benchmarks.mvar growth [--depth 4] [--width 512] [--image 256 512 1024]

Random weights, the transformer only, with guidance (two sequences). `generation` compares a state carried from scale to
scale with running Mamba-2 over the whole prefix again at every scale, as the official code does: same weights, same
inputs, alternating rounds; it times the Mamba mixers and the whole blocks. `training` compares forward and backward of
one mixer with transformers' Mamba2 on equal weights. `growth` compares with a dense VAR of equal depth and width. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.moe import build_transformer
from nextscale.backends import keep_freed_memory, optimize
from nextscale.common.machine import describe_machine
from nextscale.config.model import ModelConfig
from nextscale.config.transformer import MVAR_MIXERS, TransformerConfig
from nextscale.evaluation.latency import summarize_spread
from nextscale.info import condition_flops, count_state_bytes, scale_flops
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, PYRAMID_1024
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.mamba import Mamba2
from nextscale.transformer.scan import count_scan_multiply_adds
from nextscale.transformer.var import VAR

_PYRAMIDS = {256: PYRAMID_256, 512: PYRAMID_512, 1024: PYRAMID_1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generation", "training", "growth"])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--image", type=int, nargs="+", choices=list(_PYRAMIDS))
    parser.add_argument("--batch", type=int, default=2, help="sequences of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    run = {"generation": measure_generation, "training": measure_training, "growth": measure_growth}[options.what]
    report = run(options)
    machine = describe_machine(torch.device("cpu"))
    print(json.dumps({"what": options.what, "machine": machine, "threads": options.threads, **report}))


def create_config(options: argparse.Namespace, image: int, mixers: Any = MVAR_MIXERS) -> ModelConfig:
    """A transformer of the requested depth and width, with heads of width 64, for images of this side."""
    transformer = TransformerConfig(
        depth=options.depth, width=options.width, heads=options.width // 64, qk_norm=False, mixers=mixers
    )
    return ModelConfig(_PYRAMIDS[image], transformer=transformer)


# ---- generation


class TimedMixer(nn.Module):
    """A Mamba mixer that adds up its seconds. With `again` it carries no state: it stores the inputs of all earlier
    scales and runs over them at every scale."""

    def __init__(self, mixer: Mamba2, again: bool):
        super().__init__()
        self.mixer, self.again, self.seconds = mixer, again, 0.0
        self.inputs: list[Tensor] = []

    def new_state(self, batch: int, length: int) -> Any:
        self.inputs = []
        return self.mixer.new_state(batch, length)

    def forward(self, x_BND: Tensor, context: ScaleContext, state: Any) -> Tensor:
        began = time.perf_counter()
        if self.again:
            self.inputs.append(x_BND)
            prefix_BLD = torch.cat(self.inputs, dim=1)
            y_BLD, _ = self.mixer.continue_from(self.mixer.new_state(len(x_BND), 0), prefix_BLD)
            y_BND = y_BLD[:, -x_BND.shape[1] :]
        else:
            y_BND = self.mixer(x_BND, context, state)
        self.seconds += time.perf_counter() - began
        return y_BND


def time_blocks(model: VAR) -> list[float]:
    """Make the blocks of a model add up their seconds in the returned list of one number."""
    total = [0.0]

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.perf_counter()
            result = forward(*given)
            total[0] += time.perf_counter() - began
            return result

        return run

    for block in model.blocks:
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
    return total


@torch.inference_mode()
def measure_generation(options: argparse.Namespace) -> dict[str, Any]:
    return {"cases": [_measure_image_size(options, image) for image in options.image or (256, 512)]}


def _measure_image_size(options: argparse.Namespace, image: int) -> dict[str, Any]:
    config = create_config(options, image)
    models = {}
    for name in ("carried", "again"):
        model = build_transformer(config, "cpu").eval()
        optimize(model)
        for block in model.blocks:
            block.mixers[1] = TimedMixer(block.mixers[1], name == "again")  # type: ignore[index]
        models[name] = model, time_blocks(model)
    seconds: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in models}
    logits: dict[str, Tensor] = {}
    for turn in range(options.rounds + 1):
        for name, (model, total) in models.items():
            scale_seconds, logits[name] = _time_scales(model, total)
            if turn:
                seconds[name].append(scale_seconds)
    worst = (logits["carried"] - logits["again"]).abs().max() / logits["again"].abs().max()
    print(f"{image} px, depth {options.depth}, width {options.width}, {options.threads} threads; ms at each scale")
    print(f"logits differ by {worst:.1e} of the largest")
    columns = {n: list(zip(*rounds, strict=True)) for n, rounds in seconds.items()}
    for part, index in (("mamba", 0), ("blocks", 1)):
        for name in models:
            medians = [1000 * statistics.median(pair[index] for pair in column) for column in columns[name]]
            print(f"  {part:<7}{name:<9}" + " ".join(f"{ms:7.1f}" for ms in medians) + f"   all {sum(medians):8.1f}")
    totals = {
        n: [[sum(pair[i] for pair in scales) for i in (0, 1)] for scales in rounds] for n, rounds in seconds.items()
    }
    ratios = {}
    for i, part in enumerate(("mamba", "blocks")):
        pairs = zip(totals["again"], totals["carried"], strict=True)
        ratios[part] = summarize_spread([again[i] / carried[i] for again, carried in pairs])
        r = ratios[part]
        print(f"  {part}: {r['median']:.2f} times as fast with the state carried ({r['min']:.2f} to {r['max']:.2f})")
    return {"image": image, "difference": worst.item(), "ratio": ratios, "seconds_mamba_blocks": seconds}


def _time_scales(model: VAR, total: list[float]) -> tuple[list[tuple[float, float]], Tensor]:
    """Seconds of the Mamba mixers and of whole blocks at each scale, and the last scale's logits."""
    rng = torch.Generator().manual_seed(0)
    conditioning, cache = model.embed_condition(torch.tensor([1, 1000])), model.new_cache(2)
    mixers = [mixer for block in model.blocks for mixer in block.mixers if isinstance(mixer, TimedMixer)]
    seconds, logits = [], torch.zeros(())
    for k, count in enumerate(model.pyramid.counts):
        x_BNC = torch.randn(1, count, model.word_embed.in_features, generator=rng).repeat(2, 1, 1) if k else None
        total[0] = 0.0
        for mixer in mixers:
            mixer.seconds = 0.0
        logits = model.step(conditioning, x_BNC, k, cache).logits_BNV
        seconds.append((sum(mixer.seconds for mixer in mixers), total[0]))
    return seconds, logits


# ---- training


def measure_training(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = create_config(options, 256).transformer
    assert config is not None, "it has a transformer"
    length, width, mamba = PYRAMID_256.length, config.width, config.mamba
    ours = Mamba2(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.ndim < 2 else width**-0.5))
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=width, state_size=mamba.state_width, conv_kernel=mamba.conv_kernel, expand=mamba.expand,
            head_dim=mamba.head_width, num_heads=ours.heads, n_groups=1, use_bias=False, use_conv_bias=True,
            layer_norm_epsilon=1e-5, num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(options.batch, length, width, generator=rng, requires_grad=True)
    dy = torch.randn(options.batch, length, width, generator=rng)
    runs = {
        "nextscale": (ours, lambda: ours.continue_from(ours.new_state(options.batch, 0), x)[0]),
        "transformers": (theirs, lambda: theirs(x)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for turn in range(options.rounds + 1):
        for name, (module, forward) in runs.items():
            module.zero_grad(set_to_none=True)
            began = time.perf_counter()
            outputs[name] = forward()
            (outputs[name] * dy).sum().backward()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    worst = (outputs["nextscale"] - outputs["transformers"]).abs().max() / outputs["transformers"].abs().max()
    projections = length * width * (3 * ours.inner + 2 * ours.state + ours.heads)
    gflop = 3 * 2 * options.batch * (projections + count_scan_multiply_adds(length, ours.inner, ours.state)) / 1e9
    ratio = summarize_spread([a / b for a, b in zip(seconds["transformers"], seconds["nextscale"], strict=True)])
    print(
        f"one mixer, width {width}, {options.batch} x {length} tokens, {options.threads} threads, forward and backward"
    )
    print(f"outputs differ by {worst:.1e} of the largest; {gflop:.1f} GFLOP of ours")
    for name, taken in seconds.items():
        print(f"  {name:<13}{statistics.median(taken):.3f} s")
    print(f"  {gflop / statistics.median(seconds['nextscale']):.0f} GFLOP/s; {ratio['median']:.2f} times as fast "
          f"({ratio['min']:.2f} to {ratio['max']:.2f})")  # fmt: skip
    return {"gflop": gflop, "difference": worst.item(), "ratio": ratio, "seconds": seconds}


# ---- growth


@torch.inference_mode()
def measure_growth(options: argparse.Namespace) -> dict[str, Any]:
    cases = []
    for image in options.image or (256, 512, 1024):
        configs = {"M-VAR": create_config(options, image), "VAR": create_config(options, image, ("attention",))}
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        models = {name: build_transformer(config, "cpu").eval() for name, config in configs.items()}
        for model in models.values():
            optimize(model)
        for _ in range(options.rounds):
            for name, model in models.items():
                began = time.perf_counter()
                _time_scales(model, [0.0])
                seconds[name].append(time.perf_counter() - began)
        for name, config in configs.items():
            assert config.transformer is not None, "it has a transformer"
            scales = range(len(config.pyramid))
            flops = 2 * (condition_flops(config.transformer) + sum(scale_flops(config, k) for k in scales))
            states = 2 * count_state_bytes(config, len(config.pyramid) - 1)  # two sequences
            taken = min(seconds[name])
            print(f"{image:>5} px {name:<6}{config.pyramid.length:>6} tokens {flops / 1e9:>9.1f} GFLOP {taken:>8.2f} s "
                  f"{flops / taken / 1e9:>6.0f} GFLOP/s {states / 2**20:>8.1f} MiB of states")  # fmt: skip
            cases.append(
                {"image": image, "model": name, "tokens": config.pyramid.length, "gflop": flops / 1e9,
                 "seconds": seconds[name], "kept_bytes": states}
            )  # fmt: skip
    return {"depth": options.depth, "width": options.width, "cases": cases}


if __name__ == "__main__":
    main()
