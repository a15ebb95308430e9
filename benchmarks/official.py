"""The user's own clone of FoundationVision/VAR, with weights of ours, to be measured beside ours."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from torch import Tensor, nn

from nextscale.checkpoints.official import derived_buffers, official_tokenizer_name, official_transformer_name
from nextscale.pipeline import Pipeline


def load_official(clone: Path, pipeline: Pipeline) -> tuple[nn.Module, nn.Module]:
    """(VQVAE, VAR) built by the clone's code for the pipeline's shape, holding the pipeline's weights."""
    if not (clone / "models" / "var.py").is_file():
        sys.exit(f"{clone} is no clone of FoundationVision/VAR: it has no models/var.py")
    sys.path.insert(0, str(clone))
    import dist
    from models import build_vae_var

    config = pipeline.config
    # the clone turns the initialisation of these off for good
    kinds = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
    before = {kind: kind.reset_parameters for kind in (*kinds, nn.ConvTranspose2d)}
    with redirect_stdout(StringIO()):
        vae, var = build_vae_var(
            device=dist.get_device(),
            patch_nums=tuple(h for h, _ in config.pyramid.sides),
            num_classes=config.transformer.condition.num_classes,
            depth=config.transformer.depth,
            shared_aln=config.transformer.shared_adaln,
        )
    for kind, reset in before.items():
        kind.reset_parameters = reset
    vae.load_state_dict(
        {official_tokenizer_name(n, config, "list"): t for n, t in pipeline.tokenizer.state_dict().items()}
    )
    weights = official_names(pipeline.transformer.state_dict())
    var.load_state_dict(weights | derived_buffers(config.transformer, config.pyramid))
    return vae.eval(), var.eval()


def official_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our transformer under the official names."""
    return {official_transformer_name(name): tensor for name, tensor in tensors.items()}
