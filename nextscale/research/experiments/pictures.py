"""Pictures of an experiment's trained models: samples, or one of the analyses of `nextscale analyse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nextscale.common.pictures import save_grid
from nextscale.config.analysis import AnalysisConfig, DynamicAnalysisConfig, ErrorsConfig
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.attention import analyse_attention
from nextscale.research.analysis.convergence import analyse_convergence
from nextscale.research.analysis.dynamic import analyse_dynamic
from nextscale.research.analysis.errors import analyse_errors
from nextscale.research.analysis.features import analyse_features
from nextscale.research.analysis.routing import analyse_routing
from nextscale.training.transformer import read_run_config

OF_TRAININGS = ("progress", "scaling")
"""Pictures of the trainings' logs, which progress.py and scaling.py draw."""
_COLUMNS, _CLASSES = 8, 4


@dataclass(frozen=True)
class TrainedModel:
    """A trained model of a row."""

    name: str
    folder: Path
    sampling: SampleConfig


def draw_picture(picture: str, models: Sequence[TrainedModel], out: Path, device: str) -> None:
    """Write PICTURE.png into `out`, for an analysis also PICTURE.json. Models of one name are seeds of one setting."""
    folders, names = [str(m.folder) for m in models], [m.name for m in models]
    if picture == "samples":
        return _draw_samples(models, out / "samples.png", device)
    if picture == "dynamic":
        model = models[-1]
        analyse_dynamic(str(model.folder), out, DynamicAnalysisConfig(device=device), model.sampling)
        return
    if picture == "convergence":
        analyse_convergence(folders, out, names)
        return
    if picture == "errors":
        analyse_errors(folders, out, ErrorsConfig(device=device), models[0].sampling, names)
        return
    run = read_run_config(models[0].folder)
    config = AnalysisConfig(images=run.images, seed=run.train.seed, device=device)
    if picture == "features":
        analyse_features(folders, run.data, out, config, names)
        return
    if picture == "attention":
        analyse_attention(folders, run.data, out, config, names)
        return
    assert picture == "routing", f"there is no picture '{picture}'"
    analyse_routing(folders, run.data, out, config, names)


def _draw_samples(models: Sequence[TrainedModel], path: Path, device: str) -> None:
    """Samples of each model, with a row for each of the first classes."""
    tensors, captions = [], []
    for model in models:
        pipeline = Pipeline.from_pretrained(str(model.folder), device=device)
        classes = range(
            min(pipeline.transformer.config.condition.require_classes("this figure draws images"), _CLASSES)
        )
        images = pipeline.sample([c for c in classes for _ in range(_COLUMNS)], model.sampling)
        tensors.append(images.tensor)
        captions += [f"{model.name}: {caption}" for caption in images.captions]
    save_grid(torch.cat(tensors), captions, path, columns=_COLUMNS)
