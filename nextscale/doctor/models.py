"""Small models of every family with random weights, on which the doctor's checks run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nextscale.backends.twins import Backend
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import (
    MVAR_MIXERS,
    ConditionConfig,
    DynamicConfig,
    ExpertsConfig,
    MambaConfig,
    TransformerConfig,
)
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling import build_sampler
from nextscale.sampling.editing import Edit
from nextscale.sampling.sampler import sample_scales

CLASSES = 10
SCALES = "1,2,3,4"

FAMILIES: dict[str, TransformerConfig] = {
    "dense": TransformerConfig(depth=2, width=128, heads=4),
    "mixture": TransformerConfig(depth=2, width=128, heads=4, experts=ExpertsConfig(router="stmoe", count=4)),
    "M-VAR": TransformerConfig(
        depth=2, width=128, heads=4, mixers=MVAR_MIXERS, mamba=MambaConfig(state_width=16, head_width=32)
    ),
    "dynamic experts": TransformerConfig(
        depth=2, width=128, heads=4,
        dynamic=DynamicConfig(experts=8, scales=2, router_width=16, tau=(0.9, 0.8), router_fingerprint="random"),
    ),
}  # fmt: skip
"""Widths in multiples of 32, which fast modules and grouped products take."""


def create_model(
    transformer: TransformerConfig, backend: Backend, device: torch.device, dtype: torch.dtype, scales: str = SCALES
) -> Pipeline:
    """A generator with random weights, the same at each call, with the modules of `backend` for inference."""
    tokenizer = TokenizerConfig(
        vocab_size=256, code_width=16, base_channels=32, channel_multipliers=(1, 1, 2, 2), res_blocks=1, norm_groups=8
    )
    conditioned = replace(transformer, condition=ConditionConfig(num_classes=CLASSES))
    pipeline = Pipeline.from_config(ModelConfig(Pyramid.parse(scales), tokenizer, conditioned), backend="plain")
    randomise(pipeline)
    return pipeline.to(device, dtype).optimize(backend)


@torch.no_grad()
def randomise(pipeline: Pipeline, seed: int = 0) -> None:
    """Draw every parameter of a generator on the CPU at random, so that each part of the model has an effect."""
    rng = torch.Generator().manual_seed(seed)
    for module in (pipeline.tokenizer, pipeline.transformer):
        for name, parameter in module.named_parameters():
            spread = 0.5 if parameter.ndim < 2 or "embed" in name else parameter[0].numel() ** -0.5
            center = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=rng))
    for name, buffer in pipeline.transformer.named_buffers():
        if name.endswith(("importance_F", "activation_F")):  # 0 until they are measured
            buffer.copy_(torch.rand(buffer.shape, generator=rng))


@torch.no_grad()
def predict_logits(pipeline: Pipeline, labels: list[int], tokens_BL: Tensor) -> list[Tensor]:
    """Logits (B, N, V) of each scale, on the pipeline's device, as in sampling but with all tokens given."""
    tokens_BL = tokens_BL.to(pipeline.device)
    keep_all = Edit(tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool))
    values = pipeline.transformer.condition.parse(list(labels))
    sampler = build_sampler(pipeline.tokenizer, pipeline.transformer, values, SampleConfig(cfg=1.5), edit=keep_all)
    return [step.logits_BNV for step in sample_scales(sampler)]
