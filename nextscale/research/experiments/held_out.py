"""What experiments measure of trained models on the images that their training held out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.analyzed_model import AnalyzedModel, open_models
from nextscale.research.analysis.attention import measure_attention
from nextscale.research.experiments.intervals import resample_deviations
from nextscale.research.experiments.records import read_values
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.training.transformer import read_run_config


def open_held_out(model: Path, run: Path, device: str, images: int = AnalysisConfig.num) -> AnalyzedModel:
    """The model in a folder with the first `images` images that the training in the folder `run` held out; 0 = all."""
    config = read_run_config(run)
    settings = AnalysisConfig(num=images, images=config.images, seed=config.train.seed, device=device)
    (analyzed,) = open_models([str(model)], [], config.data, settings)
    return analyzed


def measure_own_attention(model: Path, run: Path, world: World) -> dict[str, float]:
    """Shares of attention to a token's own scale as columns of a table, of all scales but the first, see
    `measure_attention`; attention.json in the model's folder stores them."""
    file = model / "attention.json"
    if world.main and not file.exists():
        report = measure_attention(open_held_out(model, run, str(world.device)))
        values = {"own_attention": report["own_share"], "uniform_attention": report["uniform_share"]}
        scales = zip(report["scales"], report["own_share_per_scale"], strict=True)
        values |= dict([(f"own_attention_at_{scale}", share) for scale, share in scales][1:])
        blocks = zip(report["blocks"], report["own_share_per_block"], strict=True)
        values |= {f"own_attention_in_block_{block}": share for block, share in blocks}
        write_json(file, add_digest({"values": values}))
    world.wait()
    return read_values(file)


def measure_loss_noise(model: Path, run: Path, images: int, world: World) -> dict[str, float]:
    """Standard deviations of the held-out losses that training reports, over resamples of its `images` held-out images:
    {"validation_loss", "nats_1x1", ...}, nats per token; noise.json in the model's folder stores them."""
    file = model / "noise.json"
    if world.main and not file.exists():
        analyzed = open_held_out(model, run, str(world.device), images)
        names = ["validation_loss", *(f"nats_{h}x{w}" for h, w in analyzed.model.pyramid.sides)]
        deviations = resample_deviations(compute_losses(analyzed).numpy()).tolist()
        write_json(file, add_digest({"values": dict(zip(names, deviations, strict=True))}))
    world.wait()
    return read_values(file)


def compute_losses(analyzed: AnalyzedModel) -> Tensor:
    """The cross-entropy of each image in nats per token, over all scales and at each: (B, 1 + K), float64."""
    pyramid, tokenizer = analyzed.model.pyramid, analyzed.pipeline.tokenizer
    nats_BK = torch.cat(
        [
            -compute_log_likelihood(tokenizer, analyzed.model, tokens_BL, values).cpu().double()
            for values, tokens_BL in analyzed.load_batches()
        ]
    )
    return torch.cat([nats_BK.sum(1, keepdim=True) / pyramid.length, nats_BK / torch.tensor(pyramid.counts)], dim=1)
