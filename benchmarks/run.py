"""Sampling compared with the official code on equal weights: time, memory, start-up, and differences of the outputs.

    python -m benchmarks.run --official PATH [--model var-d16] [--batches 1 8] [--rounds 5] [--device cpu] [--start-up]

PATH is your clone of FoundationVision/VAR; without it, nextscale's fast path is compared with its plain path. Every
implementation runs in a separate process and reads its weights from a file; each timed round runs all of them. Prints a
table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.official import describe_shape, export_tensors
from nextscale.common.devices import find_device
from nextscale.common.machine import describe_machine
from nextscale.config.presets import preset
from nextscale.evaluation.latency import summarize_spread
from nextscale.info import describe_config
from nextscale.pipeline import Pipeline

FIRST_SCALE = """
import os, sys, time
sys.argv = ["nextscale", "sample", sys.argv[1], "--labels", "1", "--out", "first-scale.png"]
from nextscale.cli.parser import main
from nextscale.sampling.sampler import ModelPredictor
step = ModelPredictor.__call__
def stop(*given):
    step(*given)
    print(time.time(), flush=True)
    os._exit(0)
ModelPredictor.__call__ = stop
main(sys.argv[1:])
"""


class Process:
    """A worker process that answers one command at a time."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace):
        kind, _, dtype = name.partition(" ")
        command = [sys.executable, "-m", "benchmarks.worker", kind, folder, dtype, options.device]
        command += [options.official] if options.official else []
        text = [str(part) for part in command]
        self.process = subprocess.Popen(text, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None, "opened with a pipe"
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "opened with a pipe"
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with status {self.process.wait()}: {' '.join(map(str, self.process.args))}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def write_weights(folder: Path, options: argparse.Namespace) -> Pipeline:
    """Write one generator with random weights (initial gammas would be nearly 0) in both formats."""
    torch.manual_seed(0)
    pipeline = Pipeline.from_config(preset(options.model))
    for parameter in pipeline.transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    pipeline.save_pretrained(folder / "native")
    if options.official:
        (folder / "shape.json").write_text(json.dumps(describe_shape(pipeline.config)))
        for name, tensors in zip(("vae.pth", "var.pth"), export_tensors(pipeline), strict=True):
            torch.save(tensors, folder / name)
    return pipeline


def compare_outputs(names: list[str], folder: Path, pipeline: Pipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Compare each implementation with the first: teacher-forced logits, and tokens with official seeding."""
    rng = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(pipeline.config.tokenizer.vocab_size, (2, pipeline.config.pyramid.length), generator=rng)
    given = {"labels": torch.tensor([1, 2]), "inputs": pipeline.tokenizer.teacher_inputs(tokens_BL)}
    torch.save(given, folder / "given.pt")
    outputs: dict[str, dict[str, Tensor]] = {}
    for name in names:
        worker = Process(name, folder, options)
        worker.ask(do="compare", given=str(folder / "given.pt"), to=str(folder / "out.pt"))
        worker.close()
        outputs[name] = torch.load(folder / "out.pt", weights_only=True)
    base = outputs[names[0]]
    out = {}
    for name in names[1:]:
        error = (outputs[name]["logits"] - base["logits"]).abs()
        is_same = outputs[name]["tokens"] == base["tokens"]
        first = [int(row.logical_not().nonzero()[0]) if not row.all() else len(row) for row in is_same]
        agree = (outputs[name]["logits"].argmax(-1) == base["logits"].argmax(-1)).float().mean()
        out[name] = {
            "largest_logit_difference": float(error.max()),
            "rms_logit_difference": float(error.square().mean().sqrt()),
            "logit_deviation": float(base["logits"].std()),
            "likeliest_token_agrees": float(agree),
            "sampled_tokens_equal": float(is_same.float().mean()),
            "sampled_tokens_equal_up_to": first,
        }
    return out


def time_implementations(
    names: list[str], folder: Path, options: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Seconds of each round by implementation and batch; each round runs all implementations."""
    workers = {name: Process(name, folder, options) for name in names}
    seconds: dict[str, dict[int, list[float]]] = {name: {b: [] for b in options.batches} for name in names}
    for turn in range(options.rounds + 1):
        for batch in options.batches:
            for name, worker in workers.items():
                took = worker.ask(do="sample", batch=batch, seed=turn)["seconds"]
                if turn:  # the first one warms up
                    seconds[name][batch].append(took)
                print(f"round {turn} batch {batch} {name}: {took / batch:.3f} s/image", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return seconds


def measure_peak_memory(names: list[str], folder: Path, options: argparse.Namespace) -> dict[str, dict[int, int]]:
    """Peak bytes of a new process that loads the weights from a file and samples one batch."""
    out: dict[str, dict[int, int]] = {name: {} for name in names}
    for name in names:
        for batch in options.batches:
            worker = Process(name, folder, options)
            out[name][batch] = worker.ask(do="memory", batch=batch)["bytes"]
            worker.close()
    return out


def measure_start_up(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of a process: to the end of `import torch`, of the first scale, and of --help."""
    programs = {
        "import torch": ["-c", "import torch, time; print(time.time())"],
        "first scale": ["-c", FIRST_SCALE, str(folder / "native")],
        "--help": ["-c", "import time; from nextscale.cli.parser import main; main(['--help']); print(time.time())"],
    }
    out: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            began = time.time()
            run = subprocess.run([sys.executable, *program], capture_output=True, text=True, check=True)
            if turn:
                out[name].append(float(run.stdout.split()[-1]) - began)
    return out


def compute_ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    return summarize_spread([a / b for a, b in zip(slow, fast, strict=True)])


def print_report(names: list[str], result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table, the other measurements, and the line of JSON."""
    print(f"{'':<22}{'batch':>6}{'s/image':>9}{'times as fast (spread)':>26}{'GFLOP/s':>9}{'memory':>11}{'share':>7}")
    for batch in options.batches:
        for name in names:
            case = result["cases"][f"{name}, batch {batch}"]
            ratio = case.get("times_as_fast")
            text = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
            memory = f"{case['peak_bytes'] / 2**20:.0f} MiB"
            print(f"{name:<22}{batch:>6}{case['seconds']['median'] / batch:>9.3f}{text:>26}"
                  f"{case['gflop_per_s']:>9.0f}{memory:>11}{case['memory_share']:>7.2f}")  # fmt: skip
    for name, values in result["against_the_first"].items():
        print(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items()))
    for name, values in result["start_up"].items():
        print(f"{name}: {values['median']:.2f} s ({values['min']:.2f}-{values['max']:.2f})")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="clone of FoundationVision/VAR")
    parser.add_argument("--model", default="var-d16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--start-up", action="store_true", help="measure the start-up alone")
    options = parser.parse_args()

    # On a GPU the official code runs in 16 bits, as in its demo; on a CPU in float32.
    names = [f"nextscale {dtype}" for dtype in options.dtypes]
    slow_dtype = "float32" if options.device == "cpu" else options.dtypes[-1]
    names.insert(0, f"{'official' if options.official else 'plain'} {slow_dtype}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline = write_weights(folder, options)
        if options.start_up:
            times = measure_start_up(folder, options.rounds)
            print(json.dumps({name: summarize_spread(values) for name, values in times.items()}))
            return
        facts = describe_config(options.model, pipeline.config)
        gflop = (2 * facts["transformer_flops"] + facts["tokenizer_flops"]["decode"]) / 1e9
        compared = compare_outputs(names, folder, pipeline, options)
        del pipeline
        seconds = time_implementations(names, folder, options)
        memory = measure_peak_memory(names, folder, options)
        started = {name: summarize_spread(values) for name, values in measure_start_up(folder, options.rounds).items()}
    cases = {}
    for name in names:
        for batch in options.batches:
            case = cases[f"{name}, batch {batch}"] = {
                "seconds": summarize_spread(seconds[name][batch]),
                "gflop_per_s": gflop * batch / statistics.median(seconds[name][batch]),
                "peak_bytes": memory[name][batch],
                "memory_share": memory[name][batch] / memory[names[0]][batch],
            }
            if name != names[0]:
                case["times_as_fast"] = compute_ratios(seconds[names[0]][batch], seconds[name][batch])
    result = {
        "model": options.model,
        "rounds": options.rounds,
        "gflop_per_image": gflop,
        "machine": describe_machine(find_device(options.device)),
        "cases": cases,
        "against_the_first": compared,
        "start_up": started,
    }
    print_report(names, result, options)


if __name__ == "__main__":
    main()
