"""The cost of a run before it is started: `nextscale train --dry-run`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.native import read_config
from nextscale.config.model import ModelConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache, is_token_cache
from nextscale.data.captions import list_caption_parts
from nextscale.data.datasets import choose_rows, split_rows
from nextscale.data.sources import open_source
from nextscale.encoders.load import load_encoder
from nextscale.info import condition_flops, count_parameters, depends_on_tokens, scale_flops
from nextscale.pyramid import Pyramid
from nextscale.training.activations import count_activations
from nextscale.training.engine.expert_parallel import find_mixtures
from nextscale.training.engine.memory import RESERVE, Activations, choose_micro_batch, count_state_bytes
from nextscale.transformer.lora import add_adapters
from nextscale.transformer.projector import parse_scale_group
from nextscale.transformer.var import VAR

IMAGENET = 1_281_167
_PEAK_FLOPS = {"H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by their data sheets
_PEAK_SHARE = 0.4  # share of the peak that efficient training of transformers reaches
GPU_SIZES = (16, 24, 40, 80)
"""GB of common GPUs' memory."""
_DEVICES = (1, 8)
_GIB = 2**30
_VIT_B_WIDTH = 768  # features of the papers' encoders


def estimate_cost(config: RunConfig) -> str:
    """Parameters, memory per device, arithmetic and time of a run, as text; with adapters of their training.

    Reads the tokenizer's config, the cache's size and the encoder where they exist; else it assumes the official
    tokenizer, 1,000 classes, ImageNet's 1,281,167 images and features of a ViT-B, and says so.
    """
    model, notes = _build_config(config)
    examples = IMAGENET
    if config.data and is_token_cache(Path(config.data)):
        examples = TokenCache(Path(config.data)).head["examples"]["train"]
    elif config.lora.on and config.data:
        examples = _count_training_images(config, model)
    else:
        notes.append(f"assumed {IMAGENET:,} training images (ImageNet): --data names no token cache")
    transformer = _build_trained(config, model)
    assert model.transformer is not None, "a generator has a transformer"
    if depends_on_tokens(model.transformer):
        notes.append("the arithmetic is the most that may be executed: how much it is depends on the tokens")
    parameters = count_parameters(transformer)
    steps, warmup = config.train.schedule_steps(examples)
    guided, per_image = _count_guided(config, model), count_training_flops(config, model, transformer)
    if config.lora.on:
        notes.append("neither embeddings of new classes nor the samples of the model (lora.keep) are counted")
    epoch = per_image * examples
    trained, _ = _count_trained(transformer)
    share = f", {trained:,} of them trained (adapters)" if config.lora.on else ""
    lines = [
        f"model       {parameters:,} parameters{share}; {model.summarize()}",
        f"steps       {steps:,} of {config.train.batch_size} images ({steps * config.train.batch_size / examples:,.1f} "
        f"epochs of {examples:,}), {warmup:,} of them warm-up",
        f"arithmetic  {per_image / 1e12:,.3f} TFLOP per image, {epoch / 1e15:,.1f} PFLOP per epoch, "
        f"{per_image * config.train.batch_size * steps / 1e18:,.2f} EFLOP in all",
    ]
    for name, peak in _PEAK_FLOPS.items():
        hours = epoch / (peak * _PEAK_SHARE) / 3600
        total = per_image * config.train.batch_size * steps / (peak * _PEAK_SHARE) / 3600
        lines.append(
            f"time        {name} at {_PEAK_SHARE:.0%} of its peak: {hours:,.2f} h per epoch, {total:,.1f} GPU-hours"
        )
    lines += _describe_memory(config.train, transformer, parameters, guided)
    return "\n".join(lines + [f"note: {note}" for note in notes])


def count_training_flops(config: RunConfig, model: ModelConfig, transformer: VAR) -> int:
    """FLOPs of training on one image, without those of frozen networks. `transformer`: that of `model`, on any device.

    Of models whose FLOPs depend on the tokens, the most that may be executed.
    """
    assert model.transformer is not None, "a generator has a transformer"
    forward = condition_flops(model.transformer) + sum(scale_flops(model, k) for k in range(len(model.pyramid)))
    forward += count_head_flops(transformer, _count_guided(config, model))
    # the backward pass costs a forward for the inputs of layers, and one for their weights, if those are trained
    backward = 1 if config.lora.on else 2
    return forward * (1 + backward + config.train.activation_checkpointing)


def _build_trained(config: RunConfig, model: ModelConfig) -> VAR:
    """The transformer on device meta, with its adapters where those are trained."""
    _, transformer = build_on_meta(model)
    assert transformer is not None, "a generator has a transformer"
    if config.lora.on:
        with torch.device("meta"):
            add_adapters(transformer, config.lora, None, None)
    return transformer


def _count_training_images(config: RunConfig, model: ModelConfig) -> int:
    """Training images of a data set of images."""
    captioned = model.transformer is not None and bool(list_caption_parts(model.transformer.condition))
    source = open_source(config.data, model.image_size, config.images, captioned=captioned)
    rows, is_held_out_B = choose_rows(source, config.images.limit, config.train.seed)
    labels_B = torch.tensor(source.labels)[rows]
    return len(split_rows(labels_B, is_held_out_B, config.images.held_out, config.train.seed)[0])


def _count_trained(transformer: VAR) -> tuple[int, int]:
    """Parameters that are trained, and those that are not."""
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return trained, count_parameters(transformer) - trained


def _build_config(config: RunConfig) -> tuple[ModelConfig, list[str]]:
    folder, notes = Path(config.start or config.tokenizer), []
    if (config.start or config.tokenizer) and folder.is_dir():
        base, _ = read_config(folder)
    else:
        base = ModelConfig()
        notes.append("assumed the official tokenizer: give --tokenizer or --start")
    if config.scales:
        base = dataclasses.replace(base, pyramid=Pyramid.parse(config.scales))
    if config.sizes.scales:
        notes.append("arithmetic and memory are those of the model's own scales; other sizes differ with their tokens")
    width = _find_feature_width(config, notes)
    if config.start and base.transformer:
        if width and not base.transformer.alignment.width:  # training gives it a new head
            head = dataclasses.replace(config.transformer.alignment, width=width)
            base = dataclasses.replace(base, transformer=dataclasses.replace(base.transformer, alignment=head))
        return base, notes
    classes = 1000
    if config.data and is_token_cache(Path(config.data)):
        classes = len(TokenCache(Path(config.data)).class_names)
    else:
        notes.append("assumed 1,000 classes")
    return dataclasses.replace(base, transformer=config.fit(classes, base.image_size, width), class_names=()), notes


def _find_feature_width(config: RunConfig, notes: list[str]) -> int:
    """Width of the features of semantic guidance; 0 without it. Nothing is downloaded."""
    name = config.loss.encoder
    if not name:
        return 0
    if name == "cache" and config.data and is_token_cache(Path(config.data)):
        return TokenCache(Path(config.data)).load_examples("train").feature_width
    if name != "cache":
        notes.append(f"the encoder's own arithmetic and memory are not counted: {name} runs beside the model")
        if Path(name).exists():
            return load_encoder(name).width
    notes.append(f"assumed features of width {_VIT_B_WIDTH} (a ViT-B): loss.encoder names none that is here")
    return _VIT_B_WIDTH


def count_head_flops(transformer: VAR, guided: int) -> int:
    """FLOPs of the alignment head for one image, on the tokens of the first `guided` scales."""
    if not guided or transformer.projector is None:
        return 0
    layers = (m for m in transformer.projector.modules() if isinstance(m, nn.Linear))
    return 2 * transformer.pyramid.spans[guided - 1][1] * sum(m.weight.numel() for m in layers)


def _describe_memory(train: TrainConfig, transformer: VAR, parameters: int, guided: int) -> list[str]:
    """Lines on the memory of one device: what it holds, the activations, and on which GPUs that fits."""
    divided = _count_divided(train, transformer)
    tensors = "weights, gradients, optimizer" + (", averages" if train.ema else "")
    frozen = _count_trained(transformer)[1]
    parts = (("divided by the number of devices", divided), ("per device", parameters - frozen - divided))
    copies = 4 + (1 if train.ema else 0)
    sizes = [f"{4 * copies * count / _GIB:.2f} GiB {where}" for where, count in parts if count]
    sizes += [f"{4 * frozen / _GIB:.2f} GiB of weights that stay as they are"] if frozen else []
    recomputed = ", recomputed block by block" if train.activation_checkpointing else ""
    activations = count_activations(transformer, train, guided)
    all_at_once = activations.count(train.batch_size) / _GIB
    return [
        f"memory      {tensors}: {' and '.join(sizes)}",
        f"            activations: about {activations.per_example / _GIB:.3f} GiB an image and "
        f"{activations.constant / _GIB:.2f} GiB; all {train.batch_size} images at once {all_at_once:.1f} GiB "
        f"({'bfloat16' if train.precision == 'auto' else train.precision}{recomputed})",
        *_describe_fit(train, transformer, activations),
    ]


def _describe_fit(train: TrainConfig, transformer: VAR, activations: Activations) -> list[str]:
    """A table: how many images at once fit on GPUs of each size, on one and on eight of them."""
    rows = [(devices, train) for devices in _DEVICES]
    if train.sharding == "none" and len(transformer.blocks):
        rows.append((_DEVICES[-1], dataclasses.replace(train, sharding="full")))
    lines = ["images at once that fit (0: none does)".ljust(42) + "".join(f"{f'{size} GB':>8}" for size in GPU_SIZES)]
    for devices, settings in rows:
        fits = [count_fitting(settings, transformer, activations, size, devices) for size in GPU_SIZES]
        name = f"{devices} device{'s' if devices > 1 else ''}, sharding {settings.sharding}"
        share = f"of {train.batch_size // devices}"
        lines.append(f"  {name:<28}{share:>12}" + "".join(f"{count:>8}" for count in fits))
    return ["fits on     " + lines[0], *("            " + line for line in lines[1:])]


def count_fitting(train: TrainConfig, transformer: VAR, activations: Activations, size: int, devices: int = 8) -> int:
    """Images of a device's share of the batch that fit at once into a GPU of `size` GB; 0 where none does.

    A given `micro_batch` is taken or does not fit. `transformer`: on device meta.
    """
    if train.batch_size % devices:
        return 0
    trained, frozen = _count_trained(transformer)
    held = count_state_bytes(train, trained, frozen, _count_divided(train, transformer), devices)
    free = (1 - RESERVE) * size * _GIB - held
    share = train.batch_size // devices
    given = 0 if train.micro_batch == "auto" else min(train.micro_batch or share, share)
    images = given or choose_micro_batch(share, activations, free)
    return images if activations.count(images) <= free else 0


def describe_gpus(config: RunConfig) -> str:
    """The line of a recipe's header: how many images at once fit on eight GPUs of each size."""
    model, _ = _build_config(config)
    _, transformer = build_on_meta(model)
    assert transformer is not None, "a generator has a transformer"
    activations = count_activations(transformer, config.train, _count_guided(config, model))
    fits = {size: count_fitting(config.train, transformer, activations, size) for size in GPU_SIZES}
    parts = ", ".join(f"{size} GB: {count or 'none'}" for size, count in fits.items())
    return f"Images at once (of {config.train.batch_size // 8}) that fit on each of 8 GPUs, by their memory: {parts}."


def _count_guided(config: RunConfig, model: ModelConfig) -> int:
    """Scales that the alignment head projects."""
    return max(parse_scale_group(config.loss.group, len(model.pyramid))) + 1 if config.loss.encoder else 0


def _count_divided(train: TrainConfig, transformer: VAR) -> int:
    """Parameters that the processes share."""
    if train.sharding == "full":
        return _count_trained(transformer)[0]
    return _count_expert_parameters(train, transformer)


def _count_expert_parameters(train: TrainConfig, transformer: VAR) -> int:
    """Parameters that sharding: experts divides. Raises UserError where that is asked for and there are none."""
    if train.sharding != "experts":
        return 0
    mixtures = find_mixtures(transformer, "transformer").values()
    return sum(p.numel() for experts in mixtures for p in experts.parameters())
