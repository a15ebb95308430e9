"""Expert load: how often each expert is chosen, in each block and at each scale (MEPA, Table 1).

Letters: S blocks, K scales, M experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.files import write_json
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.figures import loads
from nextscale.research.analysis.subject import Subject, about, subjects
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.balance import normalise_load


def analyse_load(
    models: Sequence[str], data: str, out: Path, config: AnalysisConfig | None = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Expert load of mixtures of experts on held-out images of `data`; writes load.json and load.png into `out`.

    Returns what load.json holds. Loads are normalised to a sum of 64, variances over the experts are the sample's
    (n - 1), as in Table 1. Raises UserError for a dense model, or data that is not the model's.
    """
    config = config or AnalysisConfig()
    found, device = [], torch.device(config.device)
    for subject in subjects(models, names, data, config):
        experts, counts_SKM = subject.experts(), choices(subject)
        found.append(_report(subject, experts, counts_SKM))
    report = {"analysis": "load", **about(data, config, device), "models": found}
    write_json(out / "load.json", report)
    shown = {m["name"]: (m["experts"], m["load"], m["scales"], m["load_per_scale"]) for m in found}
    loads(shown, sum(found[0]["load"]), out / "load.png")
    return report


def choices(subject: Subject) -> Tensor:
    """How many tokens of all images chose each expert, int64 (S, K, M), on the CPU."""
    spans = subject.model.pyramid.spans
    total: Tensor | int = 0
    for output in subject.outputs():
        chosen = [routing.selected_BNM.sum(dim=0) for routing in collect(output.records, "routing")]
        chosen_SLM = torch.stack(chosen)
        total = total + torch.stack([chosen_SLM[:, start:end].sum(dim=1) for start, end in spans], dim=1)
    assert isinstance(total, Tensor), "a subject has at least one image"
    return total.cpu()


def _report(subject: Subject, experts: list[str], counts_SKM: Tensor) -> dict[str, Any]:
    """A model's loads as JSON values."""
    counts = counts_SKM.double()
    report: dict[str, Any] = {
        "name": subject.name,
        "router": subject.model.config.experts.router,
        "images": len(subject.rows),
        "experts": experts,
        "scales": subject.scales,
        "counts": counts_SKM.tolist(),
    }
    parts = {"load": counts.sum((0, 1)), "load_per_block": counts.sum(1), "load_per_scale": counts.sum(0)}
    for name, count in parts.items():
        load = normalise_load(count)
        report[name] = load.tolist()
        report[name.replace("load", "load_variance", 1)] = load.var(dim=-1, correction=1).tolist()
    return report
