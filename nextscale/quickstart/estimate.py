"""The time that a quickstart will take on this machine, from a few steps of each part on copies of the models."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch

from nextscale.common.devices import synchronize
from nextscale.common.distributed import World
from nextscale.common.rng import make_generator
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.training import TrainConfig
from nextscale.data.datasets import ImageSet
from nextscale.pipeline import Pipeline
from nextscale.quickstart.conditions import create_examples
from nextscale.training.encoder import create_encoder_task
from nextscale.training.engine.distributed import DistributedModel
from nextscale.training.engine.progress import format_duration
from nextscale.training.engine.task import Task
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.transformer import TransformerTask

_SAMPLES = 20


def estimate_time(config: QuickstartConfig, pipeline: Pipeline, images: ImageSet, encoder_size: int) -> str:
    """One line: the time of the trainings, and of sampling and measuring. The models stay as they are.

    `encoder_size`: side of the images of the encoder's training.
    """
    tasks: dict[str, tuple[Task, TrainConfig]] = {}
    tasks["tokenizer"] = TokenizerTask(pipeline.tokenizer, images.to_examples()), config.train_tokenizer
    count, pyramid = len(images), pipeline.config.pyramid
    tensors = {"tokens": torch.zeros(count, pyramid.length, dtype=torch.int64)}
    if config.loss.encoder:
        settings = replace(config.encoder, image_size=encoder_size)
        encoder = create_encoder_task(settings, images.to_examples(), config.moco, config.views, config.seed)
        tasks["encoder"] = encoder, config.train_encoder
        tensors["features"] = torch.zeros(count, *pyramid.last, config.encoder.widths[-1])
    examples = create_examples(pipeline.transformer.config.condition, images, tensors, config.seed)
    model = TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, config.train_transformer, config.loss)
    tasks["transformer"] = model, config.train_transformer
    seconds = {name: time_training(task, train, pipeline.device) for name, (task, train) in tasks.items()}
    steps = {name: train.schedule_steps(count)[0] for name, (_, train) in tasks.items()}
    trainings = ", ".join(f"{name} {format_duration(seconds[name])} ({steps[name]} steps)" for name in tasks)
    measuring = time_sampling(config, pipeline)
    total = format_duration(sum(seconds.values()) + measuring)
    return f"time on this machine: {total}: {trainings}, sampling and measuring {format_duration(measuring)}"


def time_training(task: Task, config: TrainConfig, device: torch.device) -> float:
    """Seconds that a training will take, from the second of two steps of a copy of the task."""
    task = copy.deepcopy(task, {id(task.examples): task.examples})
    model = DistributedModel(task, config, World(device=device))
    micro_batches = config.split_batch(1)[0]
    rows = micro_batches[0]
    batch = task.examples.fetch([i % len(task.examples) for i in range(rows.start, rows.stop)], None)
    batch.pop("unreadable", None)
    noise = task.draw_noise(rows.stop - rows.start, make_generator(config.seed, "time"))
    batch, noise = ({name: tensor.to(device) for name, tensor in part.items()} for part in (batch, noise))
    task.train()
    elapsed = 0.0
    for _ in range(2):
        start = time.monotonic()
        model.forward(batch, noise, 0)[0].backward()
        synchronize(device)
        elapsed = time.monotonic() - start
    return elapsed * len(micro_batches) * config.schedule_steps(len(task.examples))[0]


def time_sampling(config: QuickstartConfig, pipeline: Pipeline) -> float:
    """Seconds that sampling the images to measure will take, from a few of them."""
    asked: dict[str, Any] = {"prompts": [""]} if config.captions else {"labels": [0]}
    pipeline = copy.deepcopy(pipeline)  # fast modules keep what they prepare of the weights, which training changes
    start = time.monotonic()
    pipeline.sample(config=config.sampling, batch_size=_SAMPLES, **{n: v * _SAMPLES for n, v in asked.items()})
    return (time.monotonic() - start) * config.measure_images / _SAMPLES
