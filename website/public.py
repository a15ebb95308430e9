"""Which names the Python reference has, and whether each has a docstring. Reads the sources with griffe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

import nextscale

PYTHON_PAGES: dict[str, tuple[str, str, list[str]]] = {
    "pipeline": (
        "Pipeline and settings",
        "What `import nextscale` gives: load a model, sample, edit, reconstruct, score and save.",
        [f"nextscale.{name}" for name in sorted(nextscale.__all__, key=lambda n: (n != "Pipeline", n))]
        + ["nextscale.pipeline.Images"],
    ),
    "parts": (
        "Tokenizer, transformer and sampler",
        "The modules of a model, and the loop that samples from it.",
        [
            "nextscale.tokenizer.tokenizer.Tokenizer",
            "nextscale.transformer.var.VAR",
            "nextscale.transformer.var.Output",
            "nextscale.sampling.build_sampler",
            "nextscale.sampling.sampler",
            "nextscale.backends.optimize",
        ],
    ),
    "extend": (
        "Base classes to extend",
        "What your own router, mixer, feed-forward, condition or task derives from, and where it is registered.",
        [
            "nextscale.common.registry",
            "nextscale.transformer.feed_forward.routers.Router",
            "nextscale.transformer.feed_forward.FeedForward",
            "nextscale.transformer.context.Mixer",
            "nextscale.transformer.context.ScaleContext",
            "nextscale.transformer.condition.Condition",
            "nextscale.training.engine.task.Task",
        ],
    ),
    "train": (
        "Train",
        "What the commands that train call: images to tokens, a tokenizer, a transformer, dynamic experts.",
        [
            "nextscale.training.tokenize.tokenize",
            "nextscale.training.tokenizer.train_tokenizer",
            "nextscale.training.transformer.train_transformer",
            "nextscale.sparsify.run.sparsify",
            "nextscale.tune.run.tune",
        ],
    ),
    "checkpoints": (
        "Checkpoints",
        "Read, write and convert models: official files in both directions, other classes and sizes, experts, 8 bits.",
        [
            "nextscale.checkpoints.Checkpoint",
            "nextscale.checkpoints.native.read_checkpoint",
            "nextscale.checkpoints.saving.write_checkpoint",
            "nextscale.checkpoints.official.import_official",
            "nextscale.checkpoints.official.export_official",
            "nextscale.checkpoints.adapt.adapt",
            "nextscale.checkpoints.upcycle.upcycle",
            "nextscale.checkpoints.quantise.quantise_checkpoint",
        ],
    ),
    "measure": (
        "Measure",
        "Metrics as functions of tensors, and what `evaluate`, `statistics` and `bench` call.",
        [
            "nextscale.evaluation.run.evaluate",
            "nextscale.evaluation.run.make_statistics",
            "nextscale.evaluation.metrics.frechet.Moments",
            "nextscale.evaluation.metrics.frechet.frechet_distance",
            "nextscale.evaluation.metrics.manifold.precision_recall",
            "nextscale.evaluation.metrics.score.inception_score",
            "nextscale.evaluation.metrics.reconstruction.psnr",
            "nextscale.evaluation.metrics.reconstruction.ssim",
            "nextscale.evaluation.metrics.lpips.Lpips",
            "nextscale.evaluation.latency.compare_models",
            "nextscale.evaluation.latency.time_batch",
        ],
    ),
}
"""Page -> title, first sentence, names."""


def write_python(title: str, intro: str, names: list[str]) -> str:
    """A page of the Python reference, for mkdocstrings."""
    return "\n".join([f"# {title}", "", intro, "", *(f"::: {name}\n" for name in names)])


def list_undocumented() -> Iterator[str]:
    """Names of the Python reference that have no docstring, and their public functions, classes and properties."""
    package = griffe.load("nextscale", search_paths=[str(Path(nextscale.__path__[0]).parent)])
    for _, _, names in PYTHON_PAGES.values():
        for name in names:
            thing = package[name.removeprefix("nextscale.")]
            yield from find_undocumented(thing.final_target if thing.is_alias else thing)


def find_undocumented(thing: Any) -> Iterator[str]:
    """The paths of a griffe object and of its public members that have no docstring."""
    if not thing.docstring:
        yield thing.path
    for name, member in thing.members.items() if thing.is_class or thing.is_module else ():
        ours = not name.startswith("_") and not member.is_alias
        if ours and (member.is_function or member.is_class or "property" in member.labels):
            yield from find_undocumented(member)
