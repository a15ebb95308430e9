"""The cost of a run before it is started: `nextscale train --dry-run`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.native import read_config
from nextscale.config.model import ModelConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache, is_token_cache
from nextscale.encoders.load import load_encoder
from nextscale.info import condition_flops, depends_on_tokens, scale_flops
from nextscale.pyramid import Pyramid
from nextscale.training.engine.expert_parallel import find_mixtures
from nextscale.transformer.block import Block
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.projector import parse_scale_group
from nextscale.transformer.var import VAR

IMAGENET = 1_281_167
_PEAK_FLOPS = {"H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by their data sheets
_PEAK_SHARE = 0.4  # share of the peak that efficient training of transformers reaches
_VIT_B_WIDTH = 768  # features of the papers' encoders


def estimate_cost(config: RunConfig) -> str:
    """Parameters, memory per device, arithmetic and time of a run, as text.

    Reads the tokenizer's config, the cache's size and the encoder where they exist; else it assumes the official
    tokenizer, 1,000 classes, ImageNet's 1,281,167 images and features of a ViT-B, and says so.
    """
    model, notes = _build_config(config)
    examples = IMAGENET
    if config.data and is_token_cache(Path(config.data)):
        examples = TokenCache(Path(config.data)).head["examples"]["train"]
    else:
        notes.append(f"assumed {IMAGENET:,} training images (ImageNet): --data names no token cache")
    _, transformer = build_on_meta(model)
    assert transformer is not None, "a generator has a transformer"
    assert model.transformer is not None, "a generator has a transformer"
    if depends_on_tokens(model.transformer):
        notes.append("the arithmetic is the most that may be executed: how much it is depends on the tokens")
    parameters = sum(p.numel() for p in transformer.parameters())
    steps, warmup = config.train.schedule_steps(examples)
    guided = max(parse_scale_group(config.loss.group, len(model.pyramid))) + 1 if config.loss.encoder else 0
    forward = condition_flops(model.transformer) + sum(scale_flops(model, k) for k in range(len(model.pyramid)))
    forward += count_head_flops(transformer, guided)
    per_image = forward * (4 if config.train.activation_checkpointing else 3)  # the backward pass costs two forwards
    epoch = per_image * examples
    lines = [
        f"model       {parameters:,} parameters; {model.summarize()}",
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


def _build_config(config: RunConfig) -> tuple[ModelConfig, list[str]]:
    folder, notes = Path(config.start or config.tokenizer), []
    if (config.start or config.tokenizer) and folder.is_dir():
        base, _ = read_config(folder)
    else:
        base = ModelConfig()
        notes.append("assumed the official tokenizer: give --tokenizer or --start")
    if config.scales:
        base = dataclasses.replace(base, pyramid=Pyramid.parse(config.scales))
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
    return dataclasses.replace(base, transformer=config.with_classes(classes, width), class_names=()), notes


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
    """Lines on the memory of one device, for the configured micro-batch."""
    micro_batch = train.batch_size if train.micro_batch == "auto" else train.micro_batch or train.batch_size
    copies = 4 + (1 if train.ema else 0)  # weights, gradients, two moments, averages
    activations = count_activation_bytes(transformer, micro_batch, train, guided)
    gib = 2**30
    tensors = "weights, gradients, optimizer" + (", averages" if train.ema else "")
    divided = {"none": 0, "full": parameters, "experts": _count_expert_parameters(train, transformer)}[train.sharding]
    parts = (("divided by the number of devices", divided), ("per device", parameters - divided))
    sizes = [f"{4 * copies * count / gib:.2f} GiB {where}" for where, count in parts if count]
    recomputed = ", recomputed block by block" if train.activation_checkpointing else ""
    return [
        f"memory      {tensors}: {' and '.join(sizes)}",
        f"            activations of {micro_batch} images at once: about {activations / gib:.2f} GiB per device "
        f"({train.precision}{recomputed})",
    ]


def _count_expert_parameters(train: TrainConfig, transformer: VAR) -> int:
    """Parameters that sharding: experts divides. Raises UserError where that is asked for and there are none."""
    if train.sharding != "experts":
        return 0
    mixtures = find_mixtures(transformer, "transformer").values()
    return sum(p.numel() for experts in mixtures for p in experts.parameters())


def count_activation_bytes(transformer: VAR, images: int, train: TrainConfig, guided: int = 0) -> int:
    """Bytes that one forward pass keeps for the backward pass.

    Counted on tensors without storage in float32, for one image; half of it in 16-bit precision. `guided`: scales that
    the alignment head projects. Of blocks that are alike one is computed, and counted for all of them.
    """
    saved = _SavedTensors(transformer)
    shallow = copy.copy(transformer)
    shallow._modules = dict(transformer._modules)
    repeats = _count_repeats(transformer.blocks)
    shallow.blocks = nn.ModuleList(  # type: ignore[assignment]
        _CountedBlock(block, times, saved) for block, times in zip(transformer.blocks, repeats, strict=True)
    )
    pyramid = transformer.pyramid
    length = pyramid.length - pyramid.counts[0]
    x_BLC = torch.empty(1, length, transformer.word_embed.in_features, device="meta")
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(saved.record, lambda tensor: tensor):
        shallow(labels, x_BLC, aligned_scales=guided)
    total = sum(saved.sizes.values())
    if train.activation_checkpointing:
        depth, width = transformer.config.depth, transformer.config.width
        total = total // depth + depth * pyramid.length * width * 4
    return total * images // (1 if train.precision == "float32" else 2)


def _count_repeats(blocks: Sequence[Block]) -> list[int]:
    """How many blocks each one stands for: the first of a kind for all of it, the others for none.

    What comes from the block before belongs to the kind, so the first block of all is of its own.
    """
    kinds: list[Any] = []
    for block in blocks:
        modules, parameters = block.named_modules(), block.named_parameters()
        kinds.append(((*((n, type(m)) for n, m in modules),), (*((n, p.shape) for n, p in parameters),)))
    pairs = list(zip([None, *kinds], kinds, strict=False))
    return [pairs.count(pair) if pairs.index(pair) == i else 0 for i, pair in enumerate(pairs)]


class _SavedTensors:
    """The bytes of each storage that autograd keeps, without the weights."""

    def __init__(self, module: nn.Module):
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.UntypedStorage] = []
        """So that no later storage gets the number of an earlier one."""
        self.times = 1
        """How many blocks the running one stands for."""

    def record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.sizes.setdefault(storage._cdata, storage.nbytes() * self.times)
            self.alive.append(storage)
        return tensor

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this tensor, whatever keeps it."""
        self.sizes[tensor.untyped_storage()._cdata] = 0
        self.alive.append(tensor.untyped_storage())


class _CountedBlock(nn.Module):
    """A block whose tensors are counted so many times; with 0 it is not computed."""

    def __init__(self, block: Block, times: int, saved: _SavedTensors):
        super().__init__()
        self.block, self.adaln, self.times, self.saved = block, block.adaln, times, saved

    def forward(
        self, x_BND: Tensor, adaln_B3SD: Tensor, context: ScaleContext, states: None, previous: Record | None
    ) -> tuple[Tensor, Record | None]:
        if not self.times:
            self.saved.ignore(x_BND)  # the block that stands for this one counts its input
            return x_BND + 0, previous  # a tensor of its own, as a block's output is
        self.saved.times = self.times
        result = self.block(x_BND, adaln_B3SD, context, states, previous)
        self.saved.times = 1
        return result
