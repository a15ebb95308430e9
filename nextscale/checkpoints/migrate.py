"""Migrate checkpoints of earlier format versions.

Version 1 (nextscale 0.1.0) had other names for two fields of dynamic experts, and another fingerprint of routers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints import Shape
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint, sample_ffn_rows
from nextscale.config.migrate import restore_record
from nextscale.config.model import ModelConfig
from nextscale.config.parse import to_dict
from nextscale.config.transformer import TransformerConfig

ADDED = ".activation_F"
"""How names of tensors end that checkpoints of dynamic experts had not always; without them they are 0."""


def make_missing(held: Collection[str], expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors of `expected` that a file of an earlier version, with the names `held`, has not: zeros."""
    return {n: torch.zeros(s) for n, s in expected.items() if n.endswith(ADDED) and n not in held}


def migrate_router_fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> ModelConfig:
    """The config of a version-1 checkpoint with today's fingerprint of its routers.

    A fingerprint that does not fit the weights stays unchanged, so the routers are refused when they are used.
    """
    model = config.transformer
    if model is None or not model.dynamic.router_fingerprint:
        return config
    if _compute_version_1(weights, model) != model.dynamic.router_fingerprint:
        return config
    fingerprint = compute_router_fingerprint(weights, model)
    dynamic = dataclasses.replace(model.dynamic, router_fingerprint=fingerprint)
    return dataclasses.replace(config, transformer=dataclasses.replace(model, dynamic=dynamic))


def list_version_1_settings(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A config as version 1 stored it, with its fingerprint of the routers."""
    settings: dict[str, Any] = restore_record(to_dict(config))
    model = config.transformer
    if model is not None and model.dynamic.router_fingerprint:
        settings["transformer"]["dynamic"]["identity"] = _compute_version_1(weights, model)
    return settings


def _compute_version_1(weights: Mapping[str, Tensor], model: TransformerConfig) -> str:
    dynamic = model.dynamic
    digest = hashlib.sha256(f"{dynamic.experts} {dynamic.activation} {dynamic.late_ffn}".encode())
    for _, rows in sample_ffn_rows(weights, model):
        digest.update(rows.view(torch.int16).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
