"""The quickstart, stage by stage. Each stage resumes from what an earlier run in the same folder has finished."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.cards.card import write_card
from nextscale.checkpoints.native import read_config
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.checkpoints.verify import list_digests
from nextscale.common.devices import find_device
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.pictures import save_grid
from nextscale.common.plots import plot_curves
from nextscale.common.reading import read_json
from nextscale.config.files import record_settings
from nextscale.config.initialization import InitConfig
from nextscale.config.log import read_log
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.data.captions import TextInput, list_caption_notes
from nextscale.data.datasets import ImageSet, load_images
from nextscale.data.examples import Examples
from nextscale.data.inputs import describe_data
from nextscale.data.sources import open_source
from nextscale.encoders.self_supervised import SmallEncoder, load_small_encoder
from nextscale.evaluation.metrics.reconstruction import psnr
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.quickstart.conditions import Asked, AskedCaptions, AskedClasses, create_examples
from nextscale.quickstart.estimate import estimate_time
from nextscale.quickstart.few import find_start, train_adapter
from nextscale.quickstart.measure import check_available, measure_samples
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.encoder import EncoderCallbacks, create_encoder_task
from nextscale.training.engine.log import Values, check_loggers
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.open_run import list_points
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.transformer import TransformerTask
from nextscale.training.validation import validate

_SAMPLES_PER_CLASS, _SHOWN_CLASSES = 8, 10
_BATCH, _VALIDATED = 250, 500

DrawRouting = Callable[[Pipeline, ImageSet, QuickstartConfig, Path], None]
"""Writes routing.png and routing.json of a mixture of experts on held-out images to a folder."""


def run_quickstart(
    config: QuickstartConfig, folder: Path, draw_routing: DrawRouting | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train, sample and measure into `folder`, which `nextscale sample` then takes as a model; return the metrics.

    Writes config.json and the weights, samples.png, reconstructions.png, scales.png (one image after each scale),
    curves.png, metrics.json and log.jsonl; with guidance encoder/; what `draw_routing` writes for a mixture of experts.
    Raises Interrupted when stopped while training; a second call with the same folder resumes.
    """
    check_available()
    world = World(device=find_device(device))
    trainings = config.train_tokenizer, config.train_encoder, config.train_transformer
    check_loggers([name for train in trainings for name in train.loggers])
    start = time.monotonic()
    finished = find_finished(config, folder)
    if finished is not None:
        print(f"the quickstart in {folder} is finished; its results (to make it anew, give another --out):")
        return finished
    size, pyramid = config.geometry()
    if config.start:
        size = read_config(Path(config.start))[0].image_size
    data = load_images(config.data, size, config.limit, config.seed, config.images, config.captions)
    train_images, held_out = data.split(config.held_out, config.seed)
    check_data(config, data, train_images, held_out, size)
    record_settings(folder / "quickstart.json", to_dict(config), {"data": data.inputs})
    if base := find_start(config, len(data)):
        pipeline = train_adapter(config, base, folder, world)
        return finish(pipeline, config, data, (train_images, held_out), folder, start)
    config = fit_trainings(config, len(train_images))
    pipeline = create_pipeline(config, pyramid, data.class_names).to(world.device, torch.float32)
    if not list((folder / "training").glob("*.pt")):
        print(estimate_time(config, pipeline, train_images, min(size)), flush=True)

    train(TokenizerTask(pipeline.tokenizer, train_images.to_examples()), config.train_tokenizer, folder, world=world)
    pipeline.tokenizer.eval()
    tokens_BL = encode_tokens(pipeline, train_images.images_B3HW)
    tensors = {"tokens": tokens_BL}
    validated = held_out.select(torch.arange(min(len(held_out), _VALIDATED)))
    held_tensors = {"tokens": encode_tokens(pipeline, validated.images_B3HW)}
    if config.loss.encoder:
        encoder = train_encoder(config, train_images, held_out, min(size), folder, world)
        tensors["features"] = encode_features(train_images, encoder, pyramid.last)
        held_tensors["features"] = encode_features(validated, encoder, pyramid.last)
    condition = pipeline.transformer.config.condition
    examples = create_examples(condition, train_images, tensors, config.seed)
    task = TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, config.train_transformer, config.loss)
    held_examples = create_examples(condition, validated, held_tensors, config.seed)
    callbacks = _Callbacks(task, held_examples, pipeline, folder, world)
    train(task, config.train_transformer, folder, callbacks, world=world)
    write_checkpoint(folder, pipeline.to_checkpoint())

    by_class = not config.captions  # which expert works where is counted by class
    if draw_routing is not None and by_class and pipeline.transformer.config.experts.router != "none":
        draw_routing(pipeline, held_out, config, folder)
    return finish(pipeline, config, data, (train_images, held_out), folder, start, tokens_BL)


def finish(
    pipeline: Pipeline, config: QuickstartConfig, data: ImageSet, parts: tuple[ImageSet, ImageSet], folder: Path,
    start: float, tokens_BL: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draw the pictures, sample, measure, and write the metrics and the model card of a trained model in `folder`.

    `parts`: training and held-out images. `start`: the time when the quickstart began. `tokens_BL`: of the training
    images, of which the used codes are counted.
    """
    train_images, held_out = parts
    asked: Asked
    if config.captions:
        asked = AskedCaptions.create(config.data, held_out)
    else:
        asked = AskedClasses.create(config.data, data, str(folder), pipeline.config)
    reconstruction = draw_pictures(pipeline, config, held_out, asked, folder)
    metrics = sample_and_measure(pipeline, config, train_images, held_out, asked) | reconstruction
    metrics["cross_entropy_nats_per_token"] = {
        name: compute_cross_entropy(pipeline, images.select(torch.arange(min(len(images), 500))), asked)
        for name, images in (("training", train_images), ("held_out", held_out))
    }
    if tokens_BL is not None:
        metrics["codes_used"] = len(tokens_BL.unique()) / config.tokenizer.vocab_size
    metrics |= asked.list_examples()
    metrics["unreadable_images"] = list(data.unreadable)
    metrics["seconds"] = round(time.monotonic() - start, 1)
    metrics["model_weights"] = list_digests(folder)
    write_json(folder / "metrics.json", metrics)
    write_card(folder)
    return metrics


def check_data(
    config: QuickstartConfig, data: ImageSet, train_images: ImageSet, held_out: ImageSet, size: tuple[int, int]
) -> None:
    """Print how many images there are; UserError when there are too few."""
    print(
        f"{config.data}: {len(data)} images as {size[1]}x{size[0]}, {len(data.class_names)} classes; "
        f"{len(train_images)} to train on, {len(held_out)} held out"
    )
    data.print_notes()
    if data.captions is not None:
        text = TextInput.of_condition(config.choose_transformer(len(data.class_names)).condition)
        for note in list_caption_notes([torch.from_numpy(data.captions.length_C)], len(data), text):
            print(f"note: {note}")
    if len(held_out) == 0 or len(train_images) == 0:
        raise UserError(f"{config.data} has too few images for held_out={config.held_out}: one part would be empty")
    if config.captions:
        AskedCaptions.create(config.data, held_out)  # UserError now, and not after the training, where there are none


class _Callbacks(Callbacks):
    """Validation of the transformer; best/ has the model with the lowest held-out loss."""

    def __init__(self, task: TransformerTask, held_out: Examples, pipeline: Pipeline, folder: Path, world: World):
        self.task, self.held_out, self.pipeline, self.folder, self.world = task, held_out, pipeline, folder, world

    def validate(self, step: int) -> Values:
        return validate(self.task, self.held_out, len(self.held_out), self.world)

    def save_model(self, step: int, best: bool) -> None:
        if best:
            write_checkpoint(self.folder / "best", self.pipeline.to_checkpoint())


def find_finished(config: QuickstartConfig, folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run with the same settings and pictures in `folder`; None where there is none.

    Raises UserError when the folder holds something else, or when settings or pictures have changed since.
    """
    if not (folder / "quickstart.json").exists():
        others = [name for name in ("run.json", "config.json", "training", "stages") if (folder / name).exists()]
        if others:
            raise UserError(f"{folder} is not a quickstart's: it has {', '.join(others)}; choose another --out")
        return None
    if not (folder / "metrics.json").exists():
        return None
    source = open_source(config.data, config.geometry()[0], config.images, captioned=config.captions)
    inputs = {"data": describe_data(source)}
    record_settings(folder / "quickstart.json", to_dict(config), inputs)
    metrics = read_json(folder / "metrics.json")
    return metrics if isinstance(metrics, dict) else None


def fit_trainings(config: QuickstartConfig, images: int) -> QuickstartConfig:
    """The settings for so many training images; prints a note when trainings are shorter because of `max_epochs`."""
    fitted = config.fit_to_data(images)
    if fitted != config:
        print(
            f"note: for {images} training images the trainings pass over them at most {config.max_epochs:g} times "
            "(--max-epochs), in smaller batches and fewer steps than configured"
        )
    return fitted


def create_pipeline(config: QuickstartConfig, pyramid: Pyramid, class_names: tuple[str, ...]) -> Pipeline:
    """The models to train, with new weights."""
    transformer = config.choose_transformer(len(class_names))
    model = ModelConfig(pyramid, config.tokenizer, transformer, () if config.captions else class_names)
    return Pipeline.from_config(model, config.seed, InitConfig(adaln_gamma=0.1))


def train_encoder(
    config: QuickstartConfig, train_images: ImageSet, held_out: ImageSet, side: int, folder: Path, world: World
) -> SmallEncoder:
    """A self-supervised encoder of the training images, as `nextscale encoder train` makes it, in `folder`/encoder.

    It learns from the centre of the images, squares of `side` pixels.
    """
    train_images, held_out = train_images.crop_centre(side), held_out.crop_centre(side)
    settings = dataclasses.replace(config.encoder, image_size=side)
    task = create_encoder_task(settings, train_images.to_examples(), config.moco, config.views, config.seed)
    classes, bank = len(train_images.class_names), len(train_images)
    callbacks = EncoderCallbacks(task, held_out.to_examples(), classes, bank, folder / "encoder", world)
    train(task, config.train_encoder, folder, callbacks, world=world)
    return load_small_encoder(folder / "encoder").to(world.device)


def encode_features(data: ImageSet, encoder: SmallEncoder, grid: tuple[int, int]) -> Tensor:
    """The encoder's features (N, h, w, E) of all images, on the CPU."""
    device, batches = next(encoder.parameters()).device, data.images_B3HW.split(_BATCH)
    return torch.cat([encoder(scale_to_unit(images.to(device)), grid).cpu() for images in batches])


@torch.no_grad()
def encode_tokens(pipeline: Pipeline, images_B3HW: Tensor) -> Tensor:
    """Tokens (B, L) of uint8 images, on the CPU."""
    encode, batches = pipeline.tokenizer.encode, images_B3HW.split(_BATCH)
    return torch.cat([encode(scale_to_unit(images.to(pipeline.device))).cpu() for images in batches])


def compute_cross_entropy(pipeline: Pipeline, data: ImageSet, asked: Asked) -> float:
    """Mean cross-entropy per token, in nats, of images given their labels or captions. Far lower in training means
    memorising."""
    tokens_BL = encode_tokens(pipeline, data.images_B3HW)
    values = asked.read(data, pipeline)
    scores_BK = compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens_BL.to(pipeline.device), values)
    return float(-scores_BK.sum() / tokens_BL.numel())


def draw_pictures(
    pipeline: Pipeline, config: QuickstartConfig, held_out: ImageSet, asked: Asked, folder: Path
) -> dict[str, Any]:
    """Write the pictures of the first classes or captions; return how well held-out images are reconstructed: the mean
    of the per-image PSNR, in dB."""
    samples = pipeline.sample(config=config.sampling, batch_size=_BATCH, **asked.show(_SAMPLES_PER_CLASS))
    save_grid(samples.tensor, samples.captions, folder / "samples.png", columns=_SAMPLES_PER_CLASS)

    first = {keyword: values[:1] for keyword, values in asked.show(1).items()}
    steps = pipeline.sample_scales(config=config.sampling, **first)
    images_K3HW = torch.cat([pipeline.tokenizer.decode_canvas(step.canvas_BChw) for step in steps])
    captions = [f"{h}x{w}" for h, w in pipeline.config.pyramid.sides]
    save_grid((images_K3HW.cpu() + 1) / 2, captions, folder / "scales.png", columns=len(captions))

    real = scale_to_unit(held_out.images_B3HW[:500])
    decoded = pipeline.tokenizer.decode(pipeline.tokenizer.encode(real.to(pipeline.device))).cpu()
    pairs = torch.stack([real[:8], decoded[:8]]).flatten(0, 1)
    count = len(pairs) // 2
    captions = ["image"] * count + ["restored"] * count
    save_grid((pairs + 1) / 2, captions, folder / "reconstructions.png", columns=count)

    log = read_log(folder / "log.jsonl")
    titles = {
        ("tokenizer", "loss"): "Tokenizer: loss",
        ("transformer", "cross_entropy"): "Transformer: loss (nats per token)",
        ("transformer", "accuracy"): "Transformer: share of tokens predicted first",
    }
    panels = {
        title: {name: list_points([r for r in log if r["task"] == task], name)}
        for (task, name), title in titles.items()
    }
    plot_curves(panels, folder / "curves.png")
    return {"reconstruction_psnr_db": float(psnr((decoded + 1) / 2, (real + 1) / 2).mean())}


def sample_and_measure(
    pipeline: Pipeline, config: QuickstartConfig, train_images: ImageSet, held_out: ImageSet, asked: Asked
) -> dict[str, Any]:
    """Generate images of all classes or held-out captions in turn, other than those shown, and measure them."""
    given, labels_B = asked.measure(config.measure_images)
    shown = _SAMPLES_PER_CLASS * _SHOWN_CLASSES
    images = pipeline.sample(config=config.sampling, batch_size=_BATCH, first_image=shown, progress=True, **given)
    return measure_samples(train_images, held_out, images.tensor, labels_B)
