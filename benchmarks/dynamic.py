"""Time that dynamic experts save, and what they cost in quality.

    python -m benchmarks.dynamic ffn [--batches 1 8 32] [--active 0.25 0.58 0.8 1] [--rounds 7] [--clock wall]
    python -m benchmarks.dynamic sampling MODEL [--dense DENSE] [--batches 1 8] [--budgets 0.9 0.8 0.7] [--rounds 5]
        [--cfg 1.5]
    python -m benchmarks.dynamic quality MODEL --features NETWORK --reference DATA [--budget 0.8] [--images 2000]
        [--seeds 0 1 2 3 4] [--dense DENSE] [--variants "one tau" top-k ...] --out FOLDER

`ffn`: one FFN of VAR-d16 with random weights at its last scale, with guidance, so that a batch of B has 512 B rows.
Experts are random for each row, which is the worst case. Times include the router and the selection, and alternate with
those of the packed dense FFN.
`sampling`: seconds of the transformer, and of everything except decoding, of a checkpoint of `nextscale sparsify`, with
all experts and at budgets, beside the dense model and the executed FLOPs.
`quality`: Fréchet distances of paired seeds, dense and at a budget, beside one threshold, top-k, the oracle and pruned
FFNs at equal FLOPs, with the upper 95 % bound of the mean loss.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nextscale.backends import keep_freed_memory, optimize
from nextscale.common.machine import describe_machine
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig, TransformerConfig
from nextscale.evaluation.flops import count_sampled_flops
from nextscale.evaluation.latency import summarize_spread
from nextscale.pipeline import Pipeline
from nextscale.pyramid import PYRAMID_256
from nextscale.research.analysis.dynamic import find_threshold
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import DenseFeedForward
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward

_LAST, _GUIDED = 256, 2
_T95 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}
"""One-sided 95 % quantiles of Student's t, by the number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ffn", "sampling", "quality"])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.4, 0.58, 0.8, 1.0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=list(_CLOCKS), help="cpu: on a busy machine, one thread")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--features", default="")
    parser.add_argument("--reference", default="")
    parser.add_argument(
        "--dense", default="", help="sampling, quality: the model that it was made of; default: all experts"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="*", default=["one tau", "oracle", "top-k", "pruned", "tau at all scales"],
                        help="quality: besides the calibrated one and all experts; or another selection")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/dynamic"))
    options = parser.parse_args()
    options.batches = options.batches or ([1, 8] if options.what == "sampling" else [1, 8, 32])
    keep_freed_memory()
    run = {"ffn": measure_ffn, "sampling": measure_sampling, "quality": measure_quality}[options.what]
    report = {"what": options.what, "machine": describe_machine(torch.device(options.device)), **run(options)}
    print(json.dumps(report))


def time_alternately(
    work: dict[str, Callable[[], Any]], rounds: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each, in rounds in which they take turns, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 2):
        for name, call in work.items():
            began = now()
            call()
            if turn > 1:
                times[name].append(now() - began)
    return times


_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def _make_clock(options: argparse.Namespace) -> Callable[[], float]:
    def now() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return _CLOCKS[options.clock]()

    return now


# ---- one FFN


@torch.inference_mode()
def measure_ffn(options: argparse.Namespace) -> dict[str, Any]:
    config = TransformerConfig(depth=16, dynamic=DynamicConfig(experts=32, activation="relu"))
    dtype = getattr(torch, options.dtype)
    plain = torch.nn.ModuleList([DynamicFeedForward(config, 10), DenseFeedForward(TransformerConfig(depth=16), 10, 0)])
    dynamic, dense = optimize(plain.to(options.device, dtype))
    assert dynamic.router is not None, "divided FFNs have a router"
    router_share = sum(p.numel() for p in dynamic.router.parameters()) / (2 * config.width * config.ffn_width)
    print(f"{'rows':>6}{'active':>8}{'ms dense':>10}{'ms sparse':>11}{'router':>8}{'saved':>8}{'FLOPs':>8}{'ratio':>7}")
    cases = []
    for batch in options.batches:
        rng = torch.Generator().manual_seed(batch)
        x_TD = torch.randn(_GUIDED * batch * _LAST, config.width, generator=rng).to(options.device, dtype)
        for active in options.active:
            selected_TE = torch.rand(len(x_TD), 32, generator=rng).argsort(dim=1).argsort(dim=1) < round(active * 32)
            cases.append(_time_ffn(dynamic, dense, x_TD, selected_TE.to(options.device), options))
            case = cases[-1]
            case["flops_saved"] = 1 - case["active"] - router_share
            ratio = case["saved"] / case["flops_saved"] if case["flops_saved"] > 0 else float("nan")
            dense_ms, sparse_ms, router_ms = (1000 * times["median"] for times in case["seconds"].values())
            print(f"{case['rows']:>6}{case['active']:>8.2f}{dense_ms:>10.1f}{sparse_ms:>11.1f}{router_ms:>8.1f}"
                  f"{case['saved']:>8.1%}{case['flops_saved']:>8.1%}{ratio:>7.2f}", flush=True)  # fmt: skip
    return {"rounds": options.rounds, "dtype": options.dtype, "clock": options.clock, "cases": cases}


def _time_ffn(
    dynamic: DynamicFeedForward, dense: DenseFeedForward, x_TD: torch.Tensor, selected_TE: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    router, last_scale = dynamic.router, ScaleContext(PYRAMID_256, PYRAMID_256.spans[-1], k=len(PYRAMID_256) - 1)
    assert router is not None, "divided FFNs have a router"

    def sparse() -> torch.Tensor:
        router.select(x_TD, 0.8, "threshold")  # the cost of routing; random experts then replace its selection
        return dynamic.run_experts(x_TD, selected_TE, relu=True)

    work = {
        "dense": lambda: dense(x_TD.unsqueeze(0), last_scale),
        "sparse": sparse,
        "router": lambda: router.select(x_TD, 0.8, "threshold"),
    }
    times = time_alternately(work, options.rounds, _make_clock(options))
    ratios = [b / a for a, b in zip(times["dense"], times["sparse"], strict=True)]
    return {"rows": len(x_TD), "active": selected_TE.float().mean().item(), "ratio": summarize_spread(ratios),
            "saved": 1 - statistics.median(ratios),
            "seconds": {n: summarize_spread(t) for n, t in times.items()}}  # fmt: skip


# ---- a checkpoint


class Timed:
    """A pipeline that adds up the seconds of its transformer: steps and condition, without drawing tokens."""

    def __init__(self, pipeline: Pipeline, now: Callable[[], float]):
        self.pipeline, self.seconds = pipeline, 0.0
        for name in ("step", "embed_condition"):
            setattr(pipeline.transformer, name, self._timed(getattr(pipeline.transformer, name), now))

    def _timed(self, call: Callable[..., Any], now: Callable[[], float]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = now()
            result = call(*arguments, **named)
            self.seconds += now() - began
            return result

        return timed


def measure_sampling(options: argparse.Namespace) -> dict[str, Any]:
    now = _make_clock(options)
    base = SampleConfig(cfg=options.cfg, top_k=0, top_p=0.95)
    sparse = Timed(Pipeline.from_pretrained(options.model, device=options.device, dtype=options.dtype), now)
    dense = sparse
    if options.dense:
        dense = Timed(Pipeline.from_pretrained(options.dense, device=options.device, dtype=options.dtype), now)
    complete = base if options.dense else dataclasses.replace(base, tau=(1.0,))
    settings = {"dense": (dense, complete), "all experts": (sparse, dataclasses.replace(base, tau=(1.0,)))}
    settings |= {f"budget {b:g}": (sparse, dataclasses.replace(base, budget=b)) for b in options.budgets}
    cases = []
    for batch in options.batches:
        labels = [i % sparse.pipeline.transformer.config.condition.num_classes for i in range(batch)]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
        for turn in range(options.rounds + 2):
            for name, (model, config) in settings.items():
                model.seconds, began = 0.0, now()
                for _ in model.pipeline.sample_scales(labels, config):
                    pass
                if turn > 1:
                    times[name].append((model.seconds, now() - began))
        for name, (model, config) in settings.items():
            share = count_sampled_flops(model.pipeline, labels, config, batch).share if model is sparse else 1.0
            cases.append(_summarize_sampling(batch, name, share, times[name], times["dense"]))
    return {"model": options.model, "dense": options.dense, "rounds": options.rounds, "cases": cases}


def _summarize_sampling(
    batch: int, name: str, share: float, times: list[tuple[float, float]], dense: list[tuple[float, float]]
) -> dict[str, Any]:
    """The time that a setting saves in the transformer and in everything except decoding, round by round."""
    saved = {
        part: summarize_spread([1 - a[i] / b[i] for a, b in zip(times, dense, strict=True)])
        for i, part in enumerate(("transformer", "sampling"))
    }
    seconds = {part: summarize_spread([t[i] for t in times]) for i, part in enumerate(saved)}
    parts = ", ".join(
        f"{part} {1000 * seconds[part]['median']:.0f} ms, {ratio['median']:.1%} saved ({ratio['min']:.1%} to "
        f"{ratio['max']:.1%})" for part, ratio in saved.items()
    )  # fmt: skip
    ratio = saved["transformer"]["median"] / (1 - share) if share < 1 else float("nan")
    print(f"batch {batch}, {name}: {1 - share:.1%} of the FLOPs saved; {parts}; ratio {ratio:.2f}", flush=True)
    return {"batch": batch, "setting": name, "flops_saved": 1 - share, "saved": saved, "seconds": seconds}


def measure_quality(options: argparse.Namespace) -> dict[str, Any]:
    """Fréchet distance of each variant and seed, and the upper bound on how much worse it is than the dense model."""
    pipeline = Pipeline.from_pretrained(options.model, device=options.device)
    base, classes = (
        SampleConfig(cfg=options.cfg, top_k=0, top_p=0.95),
        pipeline.transformer.config.condition.num_classes,
    )
    labels = [i % classes for i in range(min(options.images, 64))]
    target = count_sampled_flops(pipeline, labels, dataclasses.replace(base, budget=options.budget)).share
    settings = {"all experts": dataclasses.replace(base, tau=(1.0,)),
                "calibrated": dataclasses.replace(base, budget=options.budget)}  # fmt: skip
    K = len(pipeline.config.pyramid)
    kinds = {"one tau": "threshold", "tau at all scales": "threshold"}
    for name in options.variants:
        selection, scales = kinds.get(name, name), K if name == "tau at all scales" else 1
        if scales > 1 and pipeline.transformer.config.dynamic.late_ffn:
            continue
        tau = find_threshold(pipeline, labels, dataclasses.replace(base, selection=selection), scales, target)
        settings[name] = dataclasses.replace(base, selection=selection, tau=(tau,) * scales)
    rows = {name: _measure_distances(options.model, name, config, options) for name, config in settings.items()}
    if options.dense:
        rows["dense"] = _measure_distances(options.dense, "dense", base, options)
    reference = rows["dense" if options.dense else "all experts"]
    table = []
    for name, distances in rows.items():
        worse = [b / a - 1 for a, b in zip(reference, distances, strict=True)]
        mean, n = statistics.fmean(worse), len(worse)
        half = _T95.get(n, 1.8) * statistics.stdev(worse) / n**0.5 if n > 1 else float("nan")
        share = count_sampled_flops(pipeline, labels, settings[name]).share if name in settings else 1.0
        table.append({"name": name, "share": share, "distances": distances, "worse": mean, "worse_bound": mean + half,
                      "tau": list(settings[name].tau) if name in settings else []})  # fmt: skip
        print(f"{name:<18} {share:>6.1%} of the FLOPs, distance {statistics.fmean(distances):.3f}, {mean:+.2%} "
              f"(at most {mean + half:+.2%})", flush=True)  # fmt: skip
    return {"model": options.model, "images": options.images, "seeds": options.seeds, "rows": table}


def _measure_distances(model: str, name: str, config: SampleConfig, options: argparse.Namespace) -> list[float]:
    """Fréchet distance of each seed's images; they are stored in --out, and not measured twice."""
    from nextscale.common.distributed import World
    from nextscale.config.evaluation import EvaluationConfig
    from nextscale.evaluation.run import evaluate

    distances = []
    for seed in options.seeds:
        out = options.out / f"{name.replace(' ', '-')}-{seed}.json"
        settings = EvaluationConfig(count=options.images, sampling=dataclasses.replace(config, seed=seed))
        report = evaluate(model, out, [options.features], [options.reference], settings, World())
        ((_, figures),) = report["measures"].items()
        distances.append(next(v for n, v in figures.items() if n.endswith("_fd") or n == "fid"))
    return distances


if __name__ == "__main__":
    main()
