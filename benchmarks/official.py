"""Builds the models of the user's clone of FoundationVision/VAR with our weights, to compare with them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nextscale.checkpoints.official import compute_buffers, translate_tokenizer_name, translate_transformer_name
from nextscale.config.model import ModelConfig
from nextscale.pipeline import Pipeline


def build_official(clone: Path, shape: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """(VQVAE, VAR) by the clone's code, not initialised. `shape`: patch_nums, num_classes, depth, shared_aln."""
    if not (clone / "models" / "var.py").is_file():
        sys.exit(f"{clone} is no clone of FoundationVision/VAR: it has no models/var.py")
    sys.path.insert(0, str(clone))
    import dist
    from models import build_vae_var

    # the clone disables the initialisation of these for the whole process
    kinds = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
    before = {kind: kind.reset_parameters for kind in (*kinds, nn.ConvTranspose2d)}
    with redirect_stdout(StringIO()):
        vae, var = build_vae_var(device=dist.get_device(), **{**shape, "patch_nums": tuple(shape["patch_nums"])})
    for kind, reset in before.items():
        kind.reset_parameters = reset
    return vae, var


def describe_shape(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `build_official` for a generator."""
    return {
        "patch_nums": [h for h, _ in config.pyramid.sides],
        "num_classes": config.transformer.condition.num_classes,
        "depth": config.transformer.depth,
        "shared_aln": config.transformer.shared_adaln,
    }


def export_tensors(pipeline: Pipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pipeline's weights under the official names: of VQVAE and of VAR."""
    config = pipeline.config
    vae = {translate_tokenizer_name(n, config, "list"): t for n, t in pipeline.tokenizer.state_dict().items()}
    var = rename_tensors(pipeline.transformer.state_dict())
    return vae, var | compute_buffers(config.transformer, config.pyramid)


def load_official(clone: Path, pipeline: Pipeline) -> tuple[nn.Module, nn.Module]:
    """(VQVAE, VAR) built by the clone's code, with the pipeline's shape and weights."""
    vae, var = build_official(clone, describe_shape(pipeline.config))
    tensors = export_tensors(pipeline)
    vae.load_state_dict(tensors[0])
    var.load_state_dict(tensors[1])
    return vae.eval(), var.eval()


def rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our transformer under the official names."""
    return {translate_transformer_name(name): tensor for name, tensor in tensors.items()}
