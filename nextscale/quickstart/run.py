"""The quickstart, stage by stage. Each stage picks up what an earlier run of the same folder has finished."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import record_settings, write_json
from nextscale.common.pictures import save_grid
from nextscale.common.plots import plot_curves
from nextscale.config.analysis import AnalysisConfig
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.transformer import ConditionConfig, InitConfig
from nextscale.data.datasets import ImageSet, load_images
from nextscale.data.examples import MemoryExamples
from nextscale.encoders.self_supervised import SmallEncoder, load_small_encoder
from nextscale.evaluation.metrics.reconstruction import psnr
from nextscale.pipeline import Pipeline
from nextscale.quickstart.measure import check_available, measure
from nextscale.research.analysis.routing import write_routing
from nextscale.research.analysis.subject import Subject, about
from nextscale.sampling.sampler import compute_log_likelihood
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.encoder_run import EncoderCallbacks
from nextscale.training.encoder_task import new_encoder_task
from nextscale.training.engine.log import read_log
from nextscale.training.engine.loop import train
from nextscale.training.tokenizer_task import TokenizerTask
from nextscale.training.transformer_task import TransformerTask

_SAMPLES_PER_CLASS, _SHOWN_CLASSES, _SHOWN_ROUTED = 8, 10, 500
_BATCH = 250


def run_quickstart(config: QuickstartConfig, folder: Path) -> dict[str, Any]:
    """Train, sample and measure into `folder`, which `nextscale sample` then takes as a model.

    Writes config.json and the weights, samples.png, reconstructions.png, scales.png (one image growing), curves.png,
    metrics.json and log.jsonl; of a mixture of experts routing.png and routing.json; where guidance wants it, encoder/.
    Returns the metrics. Raises Interrupted when stopped while training;
    calling it again with the same folder goes on from there.
    """
    check_available()
    started = time.monotonic()
    size, pyramid = config.geometry()
    data = load_images(config.data, size, config.limit, config.seed)
    train_set, held_out = data.split(config.held_out, config.seed)
    _say_data(config, data, train_set, held_out, size)
    record_settings(folder / "quickstart.json", to_dict(config))

    condition = ConditionConfig(num_classes=len(data.class_names))
    width = config.encoder.widths[-1] if config.loss.encoder else 0
    head = dataclasses.replace(config.transformer.alignment, width=width)
    transformer = dataclasses.replace(config.transformer, condition=condition, alignment=head)
    model = ModelConfig(pyramid, config.tokenizer, transformer, data.class_names)
    pipeline = Pipeline.from_config(model, config.seed, InitConfig(adaln_gamma=0.1))

    train(TokenizerTask(pipeline.tokenizer, train_set.to_examples()), config.train_tokenizer, folder)
    pipeline.tokenizer.eval()
    tokens_BL = encode_all(pipeline, train_set.images_B3HW)
    settings = config.train_transformer
    examples = {"tokens": tokens_BL, "label": train_set.labels_B}
    if config.loss.encoder:
        encoder = trained_encoder(config, train_set, held_out, size, folder)
        examples["features"] = features_of(train_set, encoder, pyramid.last)
    task = TransformerTask(pipeline.transformer, pipeline.tokenizer, MemoryExamples(**examples), settings, config.loss)
    train(task, settings, folder)
    pipeline.save_pretrained(folder)

    reconstruction = show(pipeline, config, held_out, folder)
    if transformer.experts.router != "none":
        shown = range(min(len(held_out), _SHOWN_ROUTED))
        analysis = AnalysisConfig(seed=config.seed)
        subject = Subject("model", pipeline, held_out.to_examples(), shown, analysis)
        write_routing([subject], about(config.data, analysis, pipeline.device), folder)
    metrics = sample_and_measure(pipeline, config, train_set, held_out) | reconstruction
    metrics["cross_entropy_nats_per_token"] = {
        name: cross_entropy(pipeline, part.select(torch.arange(min(len(part), 500))))
        for name, part in (("training", train_set), ("held_out", held_out))
    }
    metrics["codes_used"] = len(tokens_BL.unique()) / config.tokenizer.vocab_size
    metrics["unreadable_images"] = list(data.unreadable)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "metrics.json", metrics)
    return metrics


def _say_data(config: QuickstartConfig, data: ImageSet, train_set: ImageSet, held_out: ImageSet, size: int) -> None:
    print(
        f"{config.data}: {len(data)} images as {size}x{size}, {len(data.class_names)} classes; "
        f"{len(train_set)} to train on, {len(held_out)} held out"
    )
    data.print_notes()
    if len(held_out) == 0 or len(train_set) == 0:
        raise UserError(f"{config.data} has too few images for held_out={config.held_out}: one part would be empty")


def trained_encoder(
    config: QuickstartConfig, train_set: ImageSet, held_out: ImageSet, size: int, folder: Path
) -> SmallEncoder:
    """A self-supervised encoder of the training images, as `nextscale encoder train` makes it, in `folder`/encoder."""
    settings = dataclasses.replace(config.encoder, image_size=size)
    task = new_encoder_task(settings, train_set.to_examples(), config.moco, config.views, config.seed)
    classes, out = len(train_set.class_names), folder / "encoder"
    callbacks = EncoderCallbacks(task, held_out.to_examples(), classes, len(train_set), out, World())
    train(task, config.train_encoder, folder, callbacks)
    return load_small_encoder(out)


def features_of(data: ImageSet, encoder: SmallEncoder, grid_size: tuple[int, int]) -> Tensor:
    """The encoder's features (N, h, w, E) of all images."""
    return torch.cat([encoder(scale_to_unit(part), grid_size) for part in data.images_B3HW.split(_BATCH)])


@torch.no_grad()
def encode_all(pipeline: Pipeline, images_B3HW: Tensor) -> Tensor:
    """Tokens (B, L) of uint8 images."""
    return torch.cat([pipeline.tokenizer.encode(scale_to_unit(part)) for part in images_B3HW.split(_BATCH)])


def cross_entropy(pipeline: Pipeline, data: ImageSet) -> float:
    """Mean cross-entropy per token, in nats, of images given their labels. Far lower in training means memorising."""
    tokens_BL = encode_all(pipeline, data.images_B3HW)
    scores_BK = compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens_BL, data.labels_B)
    return float(-scores_BK.sum() / tokens_BL.numel())


def show(pipeline: Pipeline, config: QuickstartConfig, held_out: ImageSet, folder: Path) -> dict[str, Any]:
    """Write the pictures; return how well held-out images are reconstructed (mean of the per-image PSNR, in dB)."""
    shown = min(len(pipeline.config.class_names), _SHOWN_CLASSES)
    labels = [label for label in range(shown) for _ in range(_SAMPLES_PER_CLASS)]
    samples = pipeline.sample(labels, config.sampling, batch_size=_BATCH)
    save_grid(samples.tensor, samples.captions, folder / "samples.png", columns=_SAMPLES_PER_CLASS)

    steps = pipeline.sample_scales([0], config.sampling)
    growing = torch.cat([pipeline.tokenizer.decode_canvas(step.canvas_BChw) for step in steps])
    captions = [f"{h}x{w}" for h, w in pipeline.config.pyramid.sides]
    save_grid((growing + 1) / 2, captions, folder / "scales.png", columns=len(captions))

    real = scale_to_unit(held_out.images_B3HW[:500])
    painted = pipeline.tokenizer.decode(pipeline.tokenizer.encode(real))
    pairs = torch.stack([real[:8], painted[:8]]).flatten(0, 1)
    count = len(pairs) // 2
    captions = ["image"] * count + ["restored"] * count
    save_grid((pairs + 1) / 2, captions, folder / "reconstructions.png", columns=count)

    log = read_log(folder / "log.jsonl")
    panels = {
        f"{task}: {name}": {name: [(r["step"], r[name]) for r in log if r["task"] == task]}
        for task, name in (("tokenizer", "loss"), ("transformer", "cross_entropy"), ("transformer", "accuracy"))
    }
    plot_curves(panels, folder / "curves.png")
    return {"reconstruction_psnr_db": float(psnr((painted + 1) / 2, (real + 1) / 2).mean())}


def sample_and_measure(
    pipeline: Pipeline, config: QuickstartConfig, train_set: ImageSet, held_out: ImageSet
) -> dict[str, Any]:
    """Generate images of all classes in turn, not those shown, and measure them."""
    labels_B = torch.arange(config.measure_images) % len(pipeline.config.class_names)
    shown = _SAMPLES_PER_CLASS * _SHOWN_CLASSES
    images = pipeline.sample(labels_B, config.sampling, batch_size=_BATCH, first_image=shown, progress=True)
    return measure(train_set, held_out, images.tensor, labels_B)
