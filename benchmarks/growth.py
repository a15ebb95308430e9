"""Growth of the cost of sampling with image size, batch and depth, one at a time from VAR-d16, 256 px, batch 1.

    python -m benchmarks.growth --out docs/performance/growth [--dtype float32] [--limit-s 540]

Random weights; every point runs in a new process. Writes growth.json and growth.png; resumes after a stop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nextscale.checkpoints import build_on_meta
from nextscale.common.devices import find_device
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.evaluation.latency import time_batch
from nextscale.evaluation.peak_memory import read_peak_resident
from nextscale.info import describe_config
from nextscale.pipeline import Pipeline
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, PYRAMID_1024

SCALES = {256: PYRAMID_256, 512: PYRAMID_512, 1024: PYRAMID_1024}
BASE = {"size": 256, "batch": 1, "depth": 16}
AXES = {"size": (256, 512, 1024), "batch": (1, 4, 16, 64), "depth": (12, 16, 20, 24, 30)}


def create_config(point: dict[str, int]) -> ModelConfig:
    return ModelConfig(pyramid=SCALES[point["size"]], transformer=TransformerConfig(depth=point["depth"]))


def measure_point(point: dict[str, int], dtype: str, device: str) -> dict[str, Any]:
    """Time one batch of a model with random weights. Batch 1 runs twice, as the first run packs the weights."""
    tokenizer, transformer = build_on_meta(create_config(point))
    assert transformer is not None, "this config has one"
    for module in (tokenizer, transformer):
        module.to(getattr(torch, dtype)).to_empty(device=device)
        for parameter in module.parameters():
            torch.nn.init.uniform_(parameter, -0.03, 0.03)
    tokenizer.set_compute_dtype(getattr(torch, dtype))
    pipeline = Pipeline(create_config(point), tokenizer, transformer).optimize()
    settings = SampleConfig()
    if point["batch"] == 1:
        time_batch(pipeline, 1, settings)  # packs the weights
    scales, decoder = time_batch(pipeline, point["batch"], settings)
    memory = torch.cuda.max_memory_allocated() if device != "cpu" else read_peak_resident()
    return {
        **point,
        "seconds": sum(scales) + decoder,
        "seconds_decoder": decoder,
        "seconds_per_scale": scales,
        "peak_bytes": memory,
    }


def list_points() -> list[dict[str, int]]:
    """All points, without repetition."""
    out = []
    for axis, values in AXES.items():
        for value in values:
            point = {**BASE, axis: value}
            if point not in out:
                out.append(point)
    return out


def count_gflop(point: dict[str, int]) -> float:
    """GFLOP of one image with guidance."""
    facts = describe_config("", create_config(point))
    return (2 * facts["transformer_flops"] + facts["tokenizer_flops"]["decode"]) / 1e9


def measure_points(options: argparse.Namespace) -> dict[str, Any]:
    file = options.out / "growth.json"
    report = json.loads(file.read_text()) if file.is_file() else {"dtype": options.dtype, "points": []}
    done = [{name: p[name] for name in BASE} for p in report["points"]]
    for point in list_points():
        if point in done:
            continue
        command = [sys.executable, "-m", "benchmarks.growth", "--out", options.out, "--dtype", options.dtype]
        command += ["--device", options.device, "--point", json.dumps(point)]
        try:
            text = [str(part) for part in command]
            run = subprocess.run(text, capture_output=True, text=True, timeout=options.limit_s, check=False)
            failed = "" if run.returncode == 0 else f"ended with status {run.returncode}: {run.stderr.strip()[-200:]}"
        except subprocess.TimeoutExpired:
            failed = f"took more than {options.limit_s} s"
        result = {**point, "failed": failed} if failed else json.loads(run.stdout.splitlines()[-1])
        result["gflop_per_image"] = count_gflop(point)
        report["points"].append(result)
        report["machine"] = describe_machine(find_device(options.device))
        write_json(file, report)
        print(format_point(result), flush=True)
    return report


def format_point(point: dict[str, Any]) -> str:
    where = f"{point['size']:>5} px, batch {point['batch']:>2}, depth {point['depth']}: "
    if point.get("failed"):
        return where + point["failed"]
    each = point["seconds"] / point["batch"]
    return where + (
        f"{each:8.2f} s/image (decoder {point['seconds_decoder'] / point['batch']:.2f}), "
        f"{point['gflop_per_image'] / each:6.0f} GFLOP/s, {point['peak_bytes'] / 2**30:6.2f} GiB"
    )


def plot_growth(report: dict[str, Any], path: Path) -> None:
    """Plot seconds per image and peak memory along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        held = {name: value for name, value in BASE.items() if name != axis}
        row = [p for p in report["points"] if all(p[n] == v for n, v in held.items()) and not p.get("failed")]
        row = sorted((p for p in row if p[axis] in values), key=lambda p: p[axis])
        x = [p[axis] for p in row]
        panel.plot(x, [p["seconds"] / p["batch"] for p in row], "o-", label="seconds per image")
        panel.plot(x, [p["seconds_decoder"] / p["batch"] for p in row], "^:", label="decoder, seconds per image")
        panel.plot(x, [p["peak_bytes"] / 2**30 for p in row], "s--", label="peak memory, GiB")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(x, [str(v) for v in x])
        panel.set_xlabel({"size": "image side, pixels", "batch": "batch size", "depth": "depth"}[axis])
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"Sampling VAR from depth 16, 256 px, batch 1, in {report['dtype']}, with guidance")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds that one point may take")
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure_point(json.loads(options.point), options.dtype, options.device)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    report = measure_points(options)
    plot_growth(report, options.out / "growth.png")


if __name__ == "__main__":
    main()
