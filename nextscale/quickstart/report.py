"""Running the quickstart for the command line: what it prints at the end, and how an interruption reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextscale.errors import Interruption
from nextscale.quickstart.config import QuickstartConfig
from nextscale.quickstart.run import run_quickstart
from nextscale.train.loop import Interrupted


def run_and_report(config: QuickstartConfig, folder: Path) -> None:
    """Run, then print the measures and where the pictures are. An interruption says how to go on."""
    try:
        metrics = run_quickstart(config, folder)
    except Interrupted as stop:
        where = f" while training the {stop.task}, at step {stop.step} of {stop.steps}"
        raise Interruption(_how_to_go_on(where, folder)) from None
    except KeyboardInterrupt:
        raise Interruption(_how_to_go_on("", folder)) from None
    print("\n" + as_text(metrics, folder))


def _how_to_go_on(where: str, folder: Path) -> str:
    states = sorted(p.name for p in (folder / "training").glob("*.pt"))
    kept = f"kept in {folder / 'training'}: {', '.join(states)}" if states else "nothing was trained yet"
    return f"interrupted{where}; {kept}; the same command goes on from there"


def as_text(metrics: dict[str, Any], folder: Path) -> str:
    """The metrics for people."""
    near = metrics["distance_to_nearest_training_image"]
    entropy = metrics["cross_entropy_nats_per_token"]
    lines = [
        f"reconstruction of held-out images: {metrics['reconstruction_psnr_db']:.1f} dB PSNR",
        f"cross-entropy per token: training {entropy['training']:.2f} nats, held-out {entropy['held_out']:.2f}",
    ]
    if "generated_read_as_asked" in metrics:
        lines += [
            f"generated images read as the label asked for: {metrics['generated_read_as_asked']:.1%} "
            f"(real held-out images: {metrics['real_held_out_read_right']:.1%})",
            f"held-out real images read right by a classifier fitted on {metrics['generated_images']} generated ones: "
            f"{metrics['held_out_read_by_generated_fit']:.1%}",
        ]
    lines += [
        f"distance to the nearest training image (RMS): generated {near['generated']:.4f}, "
        f"held-out real {near['held_out_real']:.4f}",
        f"done in {metrics['seconds']:.0f} s; see {folder}/samples.png, scales.png, reconstructions.png, curves.png",
        f"more: nextscale sample {folder} --labels 3,7 --out grid.png",
    ]
    return "\n".join(lines)
