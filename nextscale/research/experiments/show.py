"""What an experiment would do, before it does it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from nextscale.config.parse import to_dict
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.research.experiments.entry import Experiment
from nextscale.research.experiments.keys import key
from nextscale.training.estimate import estimate_cost

_estimate = functools.lru_cache(estimate_cost)


def as_text(experiment: Experiment) -> str:
    """Rows, published figures, needs, and for generators the cost of each training that is not shared."""
    lines = [
        f"{experiment.name} at scale {experiment.scale}: {experiment.title}",
        f"source      {experiment.source}",
        f"measures    {', '.join(experiment.figures)}; {experiment.images:,} images, seeds "
        f"{', '.join(map(str, experiment.seeds))}",
    ]
    lines += [f"needs       --{n} {v or '(name one)'}" for n, v in experiment.needs.items()]
    lines += [f"note        {experiment.note}"] if experiment.note else []
    shown: set[str] = set()
    for row in experiment.rows:
        published = ", ".join(f"{n} {v:g}" for n, v in row.published.items()) or "not available"
        lines += ["", f"{row.name}: published {published}"]
        if not row.measured:
            continue
        if experiment.kind != "tokenizer":
            lines.append(f"    sampling    {_plain(to_dict(row.sampling))}")
            if row.run.loss.encoder:
                lines.append(
                    f"    guidance    {_encoder(experiment, row.run.loss.encoder)}; {row.run.loss.group} scales"
                )
            cost = key(to_dict(row.run))
            if cost in shown:
                lines.append("    training    shared with a row above")
            else:
                codes = experiment.needs["tokenizer"]
                folder = codes if Path(codes).is_dir() else ""
                run = dataclasses.replace(row.run, tokenizer=folder, loss=LossConfig())  # names no encoder yet
                lines += [f"    {line}" for line in _estimate(run).splitlines()]
            shown.add(cost)
            if row.sparsify is not None:
                at = f"; at {row.flops:.0%} of the dense FLOPs" if row.flops else ""
                lines.append(f"    sparsify    {_changed(row.sparsify)}{at}")
        else:
            train = row.tokenizer.train
            lines.append(f"    training    {train.steps:,} steps of {train.batch_size} images")
            lines.append(f"    tokenizer   {_plain(to_dict(row.tokenizer.tokenizer))}")
            lines.append(f"    codebook    {_plain(to_dict(row.tokenizer.codebook))}")
    return "\n".join(lines)


def _encoder(experiment: Experiment, name: str) -> str:
    """What a row's encoder is."""
    named = experiment.needs.get("encoder")
    meant = {
        "given": f"--encoder {named}",
        "untrained": "an untrained encoder",
        "features": "the feature network's map",
    }
    return meant.get(name, name)


def _changed(config: SparsifyConfig) -> str:
    """The settings that are not `nextscale sparsify`'s own."""
    before = to_dict(SparsifyConfig())
    return (
        _plain({n: v for n, v in to_dict(config).items() if v != before[n] and not isinstance(v, dict)}) or "as it is"
    )


def _plain(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
