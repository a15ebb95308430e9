"""Cost of a mixture of experts compared with dense models: sampling, and forward and backward of a training step.

    python -m benchmarks.moe sampling [--model mepa-d16] [--against var-d20] [--batches 1 8] [--rounds 5] [--device cpu]
    python -m benchmarks.moe training [--model mepa-d12] [--batch 2] [--rounds 5]
    python -m benchmarks.moe parts [--model mepa-d16] [--batches 1 8]

Random weights; the transformer only, without tokenizer and decoder, with guidance (two sequences per image). `sampling`
times every scale of both models on their fast paths, in alternating rounds. `training` compares with a dense model of
equal active parameters: its FFN is as wide as the active experts together; the optimizer is timed separately. `parts`
times the parts of a layer: routing, sorting, products, gathering and scattering. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nextscale.backends import keep_freed_memory, optimize
from nextscale.backends.cpu.experts import PackedStackedLinear, create_dispatch
from nextscale.backends.cpu.linear import apply_gelu_linear
from nextscale.common.machine import describe_machine
from nextscale.config.model import ModelConfig
from nextscale.config.presets import preset
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.evaluation.latency import summarize_spread
from nextscale.info import condition_flops, count_active_parameters, scale_flops
from nextscale.training.engine.optimizer import build_optimizer
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.experts import Experts
from nextscale.transformer.feed_forward.mixture import MixtureOfExperts
from nextscale.transformer.var import VAR

_BYTES = {"float32": 4, "bfloat16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "training", "parts"])
    parser.add_argument("--model", default="")
    parser.add_argument("--against", default="var-d20")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(_BYTES), help="of sampling")
    options = parser.parse_args()
    options.model = options.model or ("mepa-d12" if options.what == "training" else "mepa-d16")
    keep_freed_memory()
    run = {"sampling": measure_sampling, "training": measure_training, "parts": measure_parts}[options.what]
    report = {"what": options.what, "machine": describe_machine(torch.device(options.device)), **run(options)}
    print(json.dumps(report))


def build_transformer(config: ModelConfig, device: str) -> VAR:
    """The transformer with random weights, without its alignment head, which neither sampling nor CE needs."""
    model = config.transformer
    assert model is not None, "presets of generators have a transformer"
    model = dataclasses.replace(model, alignment=dataclasses.replace(model.alignment, width=0))
    with torch.device("meta"):
        var = VAR(model, config.pyramid, config.tokenizer.vocab_size, config.tokenizer.code_width)
    var.to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in var.named_parameters():
            size = 1.0 if "scale_embed" in name else 1 / (3 * model.width) ** 0.5
            parameter.uniform_(-(3**0.5) * size, 3**0.5 * size, generator=rng)
    return var


def count_multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of the transformer for one guided image."""
    assert config.transformer is not None, "presets of generators have a transformer"
    scales = sum(scale_flops(config, k) for k in range(len(config.pyramid)))
    return condition_flops(config.transformer) + scales  # two sequences, two FLOPs for each multiply-add


# ---- sampling


@torch.inference_mode()
def measure_sampling(options: argparse.Namespace) -> dict[str, Any]:
    configs = {name: preset(name) for name in (options.model, options.against)}
    models = {}
    for name, config in configs.items():
        models[name] = build_transformer(config, options.device).to(getattr(torch, options.dtype)).eval()
        optimize(models[name])
    gmac = {name: count_multiply_adds(config) / 1e9 for name, config in configs.items()}
    bytes_read = {n: sum(p.numel() for p in m.parameters()) * _BYTES[options.dtype] for n, m in models.items()}
    floor_ratio = gmac[options.model] / gmac[options.against]
    for name in configs:
        print(f"{name}: {gmac[name]:.0f} GMAC an image, {bytes_read[name] / 1e9:.2f} GB of weights")
    print(f"by operations {floor_ratio:.3f} times")
    cases = [time_batch_size(models, batch, options) for batch in options.batches]
    return {"gmac_per_image": gmac, "weight_bytes": bytes_read, "floor": floor_ratio, "dtype": options.dtype,
            "rounds": options.rounds, "cases": cases}  # fmt: skip


def time_batch_size(models: dict[str, VAR], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time both models at one batch size, in alternating rounds after one to warm up."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            scales = time_scales(model, batch, options.device)
            if turn:
                seconds[name].append(scales)
    whole = {name: [sum(scales) for scales in rounds] for name, rounds in seconds.items()}
    ratios = summarize_spread([a / b for a, b in zip(whole[options.model], whole[options.against], strict=True)])
    columns = {name: zip(*rounds, strict=True) for name, rounds in seconds.items()}
    per_scale = {name: [statistics.median(column) for column in found] for name, found in columns.items()}
    print(f"batch {batch}: {options.model} {statistics.median(whole[options.model]):.3f} s, {options.against} "
          f"{statistics.median(whole[options.against]):.3f} s, {ratios['median']:.3f} times "
          f"({ratios['min']:.3f} to {ratios['max']:.3f})")  # fmt: skip
    for name, scales in per_scale.items():
        print(f"    {name:<10} ms per scale " + " ".join(f"{1000 * s:.0f}" for s in scales))
    return {"batch": batch, "ratio": ratios, "seconds": {n: summarize_spread(w) for n, w in whole.items()},
            "seconds_per_scale": per_scale}  # fmt: skip


def time_scales(model: VAR, batch: int, device: str) -> list[float]:
    """Seconds of the transformer at each scale of sampling."""
    rng = torch.Generator(device).manual_seed(batch)
    values = torch.arange(batch, device=device) % model.condition.num_classes
    conditioning, cache = model.embed_condition(model.condition.add_unconditional(values)), model.new_cache(2 * batch)
    width, marks = model.word_embed.in_features, [_read_clock(device)]
    for k, count in enumerate(model.pyramid.counts):
        x_BNC = torch.randn(batch, count, width, device=device, generator=rng).repeat(2, 1, 1) if k else None
        model.step(conditioning, x_BNC, k, cache)
        marks.append(_read_clock(device))
    return [b - a for a, b in pairwise(marks)]


def _read_clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- training


def measure_training(options: argparse.Namespace) -> dict[str, Any]:
    config = preset(options.model)
    mixture = config.transformer
    assert mixture is not None, "presets of generators have a transformer"
    assert mixture.experts.router != "none", f"{options.model} has no experts"
    dense = dataclasses.replace(
        mixture, ffn_ratio=mixture.ffn_ratio * mixture.experts.active,
        experts=dataclasses.replace(mixture.experts, router="none"),
    )  # fmt: skip
    names = {options.model: mixture, "dense, equally active": dense}
    whole = {name: dataclasses.replace(config, transformer=t) for name, t in names.items()}
    models = {name: build_transformer(c, options.device).train() for name, c in whole.items()}
    for model in models.values():
        optimize(model, training=True)
    active = {n: count_active_parameters(c, sum(p.numel() for p in models[n].parameters())) for n, c in whole.items()}
    print("; ".join(f"{name}: {count / 1e6:.1f} M active parameters" for name, count in active.items()))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    optimizer_seconds = {}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            took = time_step(model, options.batch, options.device)
            if turn:
                seconds[name].append(took)
    for name, model in models.items():
        optimizer_seconds[name] = time_optimizer(model, options)
    ratios = summarize_spread([a / b for a, b in zip(*seconds.values(), strict=True)])
    for name, times in seconds.items():
        rest = optimizer_seconds[name]
        print(f"{name:<24} {statistics.median(times):.3f} s forward and backward, optimizer {rest:.3f} s")
    print(f"{ratios['median']:.3f} times ({ratios['min']:.3f} to {ratios['max']:.3f})")
    return {"batch": options.batch, "active_parameters": active, "ratio": ratios, "rounds": options.rounds,
            "seconds": {n: summarize_spread(s) for n, s in seconds.items()},
            "optimizer_seconds": optimizer_seconds}  # fmt: skip


def time_step(model: VAR, batch: int, device: str) -> float:
    """Seconds of forward and backward of the cross-entropy on random tokens."""
    rng = torch.Generator().manual_seed(0)
    pyramid, width = model.pyramid, model.word_embed.in_features
    x_BLC = torch.randn(batch, pyramid.length - pyramid.counts[0], width, generator=rng).to(device)
    tokens_R = torch.randint(model.head.out_features, (batch * pyramid.length,), generator=rng).to(device)
    labels_B = torch.arange(batch, device=device)
    model.zero_grad(set_to_none=True)
    began = _read_clock(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits_BLV = model(labels_B, x_BLC).logits_BNV
    F.cross_entropy(logits_BLV.flatten(0, 1), tokens_R).backward()
    return _read_clock(device) - began


def time_optimizer(model: VAR, options: argparse.Namespace) -> float:
    """Seconds of an AdamW step, which updates all experts."""
    optimizer = build_optimizer(model, TrainConfig())
    times = []
    for _ in range(3):
        began = _read_clock(options.device)
        optimizer.step()
        times.append(_read_clock(options.device) - began)
    return min(times[1:])


# ---- where the time goes


@torch.inference_mode()
def measure_parts(options: argparse.Namespace) -> dict[str, Any]:
    config = preset(options.model)
    shallow = dataclasses.replace(config.transformer, depth=1)
    model = build_transformer(dataclasses.replace(config, transformer=shallow), options.device)
    optimize(model.eval())
    layer, depth = model.blocks[0].ffn, config.transformer.depth
    assert isinstance(layer, MixtureOfExperts), f"{options.model} has no experts"
    cases = []
    for batch in options.batches:
        print(f"batch {batch}, ms of all {depth} blocks")
        print(f"{'scale':<8}{'rows':>6}" + "".join(f"{name:>10}" for name in _PARTS))
        for k, (side, count) in enumerate(zip(config.pyramid.sides, config.pyramid.counts, strict=True)):
            found = {n: depth * t for n, t in time_parts(layer, k, batch, model, options).items()}
            cases.append({"batch": batch, "scale": list(side), "rows": 2 * batch * count, "seconds": found})
            print(
                f"{side[0]:>2}x{side[1]:<5}{2 * batch * count:>6}"
                + "".join(f"{1000 * t:>10.2f}" for t in found.values())
            )
        whole = {n: sum(c["seconds"][n] for c in cases if c["batch"] == batch) for n in _PARTS}
        print(f"{'all':<14}" + "".join(f"{1000 * t:>10.1f}" for t in whole.values()))
    return {"model": options.model, "rounds": options.rounds, "cases": cases}


_PARTS = ("route", "sort", "experts", "in order", "in turn", "layer", "dense")
"""Experts read and add rows where they lie; "in order" is the same work on rows that already stand in the experts'
order, so the difference is gathering and scattering; "in turn" is one expert after the other, as without the compiled
kernel. The last two: the layer as it is run, and a dense FFN of as many active parameters on the same rows."""


def time_parts(
    layer: MixtureOfExperts, k: int, batch: int, model: VAR, options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each part of one layer at one scale."""
    rng = torch.Generator().manual_seed(k)
    x_BND = torch.randn(2 * batch, model.pyramid.counts[k], model.config.width, generator=rng).to(options.device)
    context = ScaleContext(model.pyramid, model.pyramid.spans[k], k=k)
    routing, experts, x_TD = layer.router(x_BND, context), layer.experts, x_BND.flatten(0, 1)
    selected_TM, gates_TM = (t.flatten(0, 1) for t in (routing.selected_BNM, routing.gates_BNM))
    pairs = layer.router.count_pairs(x_BND.shape[:2], context)
    dispatch = create_dispatch(selected_TM, pairs)
    gate_R, count = gates_TM[dispatch.row_R, dispatch.expert_R], len(dispatch.row_R)
    rows_RD, ones_R = x_TD[dispatch.row_R], torch.ones(count, device=x_TD.device)
    in_order = dataclasses.replace(dispatch, row_R=torch.arange(count, device=x_TD.device))
    wide = _build_dense_ffn(experts.fc1.bias.dtype, model.config, options.device)
    in_turn = _build_plain_experts(layer, model.config)
    experts(x_TD, gates_TM, selected_TM, pairs)  # packs

    work: dict[str, Callable[[], Any]] = {
        "route": lambda: layer.router(x_BND, context),
        "sort": lambda: (create_dispatch(selected_TM, pairs), gates_TM[dispatch.row_R, dispatch.expert_R]),
        "experts": lambda: experts.run(x_TD, gate_R, dispatch),
        "in order": lambda: experts.run(rows_RD, ones_R, in_order),
        "in turn": lambda: in_turn(x_TD, gate_R, dispatch),
        "layer": lambda: layer(x_BND, context, None),
        "dense": lambda: wide[1](apply_gelu_linear(wide[0], x_BND)),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds + 2):
        for name, call in work.items():
            began = _read_clock(options.device)
            call()
            if turn > 1:
                times[name].append(_read_clock(options.device) - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


_IN_TURN: dict[int, Callable[..., Any]] = {}


def _build_plain_experts(layer: MixtureOfExperts, config: TransformerConfig) -> Callable[..., Any]:
    """The experts of a layer one after the other, each by oneDNN where it is at hand; made once."""
    if id(layer) not in _IN_TURN:
        plain = Experts(layer.experts.count, config.width, config.ffn_width)
        plain.load_state_dict(layer.experts.state_dict())
        (experts,) = optimize(nn.ModuleList([plain.to(layer.experts.fc1.bias)])).children()
        for stack in experts.children():
            if isinstance(stack, PackedStackedLinear):
                stack.pack()
        _IN_TURN[id(layer)] = partial(Experts.run, experts)
    return _IN_TURN[id(layer)]


_WIDE: dict[str, nn.ModuleList] = {}


def _build_dense_ffn(dtype: torch.dtype, config: TransformerConfig, device: str) -> nn.ModuleList:
    """A dense FFN as wide as the active experts together; made once."""
    if device not in _WIDE:
        width, hidden = config.width, config.ffn_width * config.experts.active
        pair = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, width)])
        optimize(pair.to(device, dtype))
        _WIDE[device] = pair
    return _WIDE[device]


if __name__ == "__main__":
    main()
