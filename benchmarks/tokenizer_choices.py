"""Compares codebook settings of the tokenizer at equal training time on one machine.

    python -m benchmarks.tokenizer_choices --train cifar10-train.parquet --test cifar10-test.parquet \
        --out runs/tokenizer-choices --minutes 10

Every variant is `nextscale tokenizer train` with the recipe tokenizer-cifar10 and the options below, on one thread; two
variants run in parallel. A short run measures each variant's speed, and sets the number of steps so that all train for
the same number of minutes. Finished variants are not repeated; an interrupted one is resumed. Writes results.json,
results.md and curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nextscale.common.files import write_json, write_text
from nextscale.common.plots import plot_curves
from nextscale.config.log import read_log

RECIPE = "tokenizer-cifar10"
BATCH, PROBE_STEPS = 32, 120
VARIANTS = {
    "as configured": [],  # moving averages, revival, 4 phi
    "another seed": ["--train.seed", "1"],
    "no revival": ["--codebook.revive-every", "0"],
    "gradient codebook": ["--codebook.update", "gradient"],
    "gradient, no revival": ["--codebook.update", "gradient", "--codebook.revive-every", "0"],
    "1 phi": ["--tokenizer.num-phi", "1"],
}
COLUMNS = ("steps", "minutes", "psnr_db", "ssim", "perplexity", "usage", "revived")


def run_command(*arguments: str, log: Path) -> None:
    """Run the command line on one thread; its output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        command = [sys.executable, "-m", "nextscale.cli", *arguments]
        subprocess.run(command, stdout=output, stderr=output, env=environment, check=True)


def train_variant(options: argparse.Namespace, name: str, folder: Path, steps: int) -> list[dict]:
    """Train a variant for some steps; returns its log."""
    save_every = max(1, steps // 8)
    run_command(
        "tokenizer", "train", RECIPE, "--data", options.train, "--out", str(folder), *VARIANTS[name],
        "--train.steps", str(steps), "--train.save-every", str(save_every), "--train.log-every", "20",
        "--device", "cpu", log=folder.with_suffix(".log"),
    )  # fmt: skip
    return read_log(folder / "log.jsonl")


def measure_variant(options: argparse.Namespace, name: str) -> dict:
    """Measure a variant's speed, train it, and evaluate it on the test images."""
    folder = options.out / name.replace(" ", "-").replace(",", "")
    probe = train_variant(options, name, folder / "probe", PROBE_STEPS)
    speeds = [record["images_per_s"] for record in probe if "images_per_s" in record]
    steps = round(options.minutes * 60 * statistics.median(speeds[1:]) / BATCH)
    log = train_variant(options, name, folder / "run", steps)
    run_command(
        "tokenizer", "evaluate", str(folder / "run"), "--data", options.test, "--out", str(folder / "test"),
        log=folder / "test.log",
    )  # fmt: skip
    report = json.loads((folder / "test" / "report.json").read_text())
    seconds = sum(20 * BATCH / r["images_per_s"] for r in log if "images_per_s" in r)
    points = {key: [(r["step"], r[key]) for r in log if key in r] for key in ("psnr_db", "perplexity", "usage")}
    return {**report, "steps": steps, "minutes": seconds / 60, "revived": log[-1]["revived"], "curves": points}


def format_table(results: dict[str, dict]) -> str:
    rows = [f"| variant | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, result in results.items():
        cells = [f"{result[c]:.3g}" if c in ("ssim", "usage") else f"{result[c]:.4g}" for c in COLUMNS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training images")
    parser.add_argument("--test", required=True, help="test images")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="training time of each variant")
    parser.add_argument("--side-by-side", type=int, default=2, help="variants trained at once, one thread each")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = dict(zip(VARIANTS, pool.map(lambda name: measure_variant(options, name), VARIANTS), strict=True))
    write_json(options.out / "results.json", results)
    write_text(options.out / "results.md", format_table(results))
    panels = ("psnr_db", "perplexity", "usage")
    plot_curves({p: {n: r["curves"][p] for n, r in results.items()} for p in panels}, options.out / "curves.png")
    print(format_table(results))


if __name__ == "__main__":
    main()
