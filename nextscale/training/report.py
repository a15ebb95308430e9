"""Texts that the commands print: results of runs, and interruptions."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextscale.common.errors import Interruption
from nextscale.config.classes import quote_name
from nextscale.training.engine.checks import Interrupted

_MANY_COPIES, _FAR_APART = 0.5, 2.0


@contextmanager
def report_interruption(*folders: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says which states are in the run's folders and how to resume."""
    try:
        yield
    except Interrupted as stop:
        where = f" while training the {stop.task}, at step {stop.step} of {stop.steps}"
        raise Interruption(_describe_states(where, folders)) from None
    except KeyboardInterrupt:
        raise Interruption(_describe_states("", folders)) from None


def _describe_states(where: str, folders: Sequence[Path]) -> str:
    states = {folder / "training": sorted(p.name for p in (folder / "training").glob("*.pt")) for folder in folders}
    found = [f"kept in {place}: {', '.join(names)}" for place, names in states.items() if names]
    kept = "; ".join(found) or "nothing was trained yet"
    return f"interrupted{where}; {kept}; the same command goes on from there"


def format_quickstart_report(metrics: dict[str, Any], folder: Path) -> str:
    """The quickstart's metrics as text."""
    distance = metrics["distance_to_nearest_training_image"]
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
    if "prompts" in metrics:
        asked = "--prompt " + " ".join(map(shlex.quote, metrics["prompts"]))
    else:
        asked = "--labels " + shlex.quote(",".join(map(quote_name, metrics.get("labels") or ["0"])))
    pictures = "samples.png, scales.png, reconstructions.png, curves.png"
    pictures += ", routing.png (which expert works where)" if (folder / "routing.png").exists() else ""
    lines += [
        f"distance to the nearest training image (RMS): generated {distance['generated']:.4f}, "
        f"held-out real {distance['held_out_real']:.4f}",
        *([describe_copies(metrics["copies"], metrics["cross_entropy_nats_per_token"])] if "copies" in metrics else []),
        f"done in {metrics['seconds']:.0f} s; see {folder}/{pictures}",
        f"more: nextscale sample {folder} {asked} --out grid.png",
    ]
    return "\n".join(lines)


def describe_copies(copies: float, entropy: dict[str, float]) -> str:
    """Whether a model copies its training images, in words. `copies`: share of samples that are nearer to a training
    image than 95 % of the held-out images are."""
    share = f"{copies:.0%} of the samples are nearer to a training image than 95 % of the held-out images are"
    if copies > _MANY_COPIES:
        return (
            f"the model copies: {share}, 5 % would be expected of new images. It knows its training images by heart; "
            "more images help most"
        )
    apart = entropy["held_out"] - entropy["training"]
    if apart > _FAR_APART:
        return (
            f"the samples are no copies ({share}), but the model knows its training images by heart: it predicts "
            f"held-out ones worse by {apart:.2f} nats per token. More images help most"
        )
    return f"the samples are no copies of the training images: {share}"


def format_tokenizer_report(report: dict[str, Any]) -> str:
    """A tokenizer's evaluation as text."""
    lines = [f"{report['images']} images: {report['psnr_db']:.2f} dB PSNR"]
    lines[0] += f", SSIM {report['ssim']:.3f}" if "ssim" in report else ""
    lines.append(
        f"codebook of {report['codebook']}: {report['usage']:.1%} used, perplexity {report['perplexity']:.0f} "
        f"({report['perplexity'] / report['codebook']:.1%}) over all scales"
    )
    psnrs, scales = report.get("psnr_db_per_scale", []), report["scales"].split(",")
    lines.append("  scale     used   perplexity" + "   PSNR of the scales so far" * bool(psnrs))
    texts = [f"{psnr:>25.2f} dB" for psnr in psnrs] or [""] * len(scales)
    per_scale = zip(scales, report["usage_per_scale"], report["perplexity_per_scale"], texts, strict=True)
    lines += [f"  {side:<7}{used:>7.1%}{perplexity:>13.1f}{text}" for side, used, perplexity, text in per_scale]
    return "\n".join(lines)


def format_training_report(values: dict[str, Any], folder: Path, start: str = "") -> str:
    """A generator's last validation as text. `start`: the model, where the folder holds an adapter of it."""
    lines = [f"done: {folder}"]
    if values:
        loss, accuracy = values["validation_loss"], values["validation_accuracy"]
        lines.append(f"held-out cross-entropy {loss:.3f} nats per token, accuracy {accuracy:.1%}; per scale:")
        lines.append("  " + " ".join(f"{v:.2f}" for v in values["validation_loss_per_scale"]))
    start_of_sizes = "validation_loss_at_"
    sizes = {
        name.removeprefix(start_of_sizes): value for name, value in values.items() if name.startswith(start_of_sizes)
    }
    measured = [f"{size} {value:.3f}" for size, value in sizes.items() if not isinstance(value, list)]
    if measured:
        lines.append(f"by size (the figure above is their mean): {', '.join(measured)} nats per token")
    if "frequency_loss" in values:
        lines.append(
            f"token frequencies of each class and position alone: {values['frequency_loss']:.3f} nats per token"
        )
    pictures = "samples.png, curves.png" if (folder / "curves.png").exists() else "samples.png"
    model = f"{start} --lora {folder}" if start else folder
    lines.append(f"see {folder}/{pictures}; draw: nextscale sample {model} --labels 0 --out grid.png")
    return "\n".join(lines)
