"""Describes an experiment before it runs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from nextscale.config.parse import to_dict
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.research.experiments.entry import Experiment
from nextscale.research.experiments.keys import compute_key
from nextscale.training.estimate import estimate_cost

_estimate = functools.lru_cache(estimate_cost)


def format_experiment(experiment: Experiment) -> str:
    """Rows, published values, inputs, and for generators the cost of each training that is not shared."""
    lines = [
        f"{experiment.name} at scale {experiment.scale}: {experiment.title}",
        f"source      {experiment.source}",
        f"metrics     {', '.join(experiment.metrics)}; {experiment.images:,} images, seeds "
        f"{', '.join(map(str, experiment.seeds))}",
    ]
    lines += [f"input       --{n} {v or '(required)'}" for n, v in experiment.needs.items()]
    lines += [f"note        {experiment.note}"] if experiment.note else []
    if experiment.one_training:
        lines.append(f"seeds       of sampling; each row has one training, with seed {experiment.seeds[0]}")
    if experiment.choice is not None:
        given = experiment.choice
        tried = "; ".join(f"{name} of {', '.join(map(str, values))}" for name, values in given.values.items())
        rows = "by the first row, for all rows" if given.of_first_row else "for each row"
        lines.append(f"choose      {rows}: {tried}; seeds {', '.join(map(str, given.seeds))}")
    shown: set[str] = set()
    for row in experiment.rows:
        published = ", ".join(f"{n} {v:g}" for n, v in row.published.items()) or "not available"
        lines += ["", f"{row.name}: published {published}"]
        if not row.measured:
            continue
        if experiment.kind != "tokenizer":
            lines.append(f"    sampling    {_format_settings(to_dict(row.sampling))}")
            if row.run.loss.encoder:
                encoder = _describe_encoder(experiment, row.run.loss.encoder)
                alone = "" if row.run.loss.aggregate else ", each without the coarser ones"
                lines.append(f"    guidance    {encoder}; {row.run.loss.group} scales{alone}")
            training = compute_key(to_dict(row.run))
            if training in shown:
                lines.append("    training    shared with a row above")
            else:
                tokenizer = experiment.needs["tokenizer"]
                folder = tokenizer if Path(tokenizer).is_dir() else ""
                run = dataclasses.replace(row.run, tokenizer=folder, loss=LossConfig())  # the encoder may not exist yet
                lines += [f"    {line}" for line in _estimate(run).splitlines()]
            shown.add(training)
            if row.after < 1:
                lines.append(f"    measured    after {row.after:.0%} of the training")
            if row.sparsify is not None:
                at = f"; at {row.flops:.0%} of the dense FLOPs" if row.flops else ""
                lines.append(f"    sparsify    {_format_changes(row.sparsify)}{at}")
        else:
            train = row.tokenizer.train
            lines.append(f"    training    {train.steps:,} steps of {train.batch_size} images")
            lines.append(f"    tokenizer   {_format_settings(to_dict(row.tokenizer.tokenizer))}")
            lines.append(f"    codebook    {_format_settings(to_dict(row.tokenizer.codebook))}")
    return "\n".join(lines)


def _describe_encoder(experiment: Experiment, name: str) -> str:
    """A row's encoder in words."""
    descriptions = {
        "given": f"--encoder {experiment.needs.get('encoder')}",
        "untrained": "an untrained encoder",
        "features": "the feature network's map",
        "pixels": "the pixels",
    }
    return descriptions.get(name, name)


def _format_changes(config: SparsifyConfig) -> str:
    """The settings that differ from the defaults of `nextscale sparsify`."""
    defaults = to_dict(SparsifyConfig())
    changes = {n: v for n, v in to_dict(config).items() if v != defaults[n] and not isinstance(v, dict)}
    return _format_settings(changes) or "default settings"


def _format_settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
