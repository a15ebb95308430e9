"""Expert load: how often each expert is selected, in each block and at each scale (MEPA, Table 1).

Letters: S blocks, K scales, M experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.files import write_json
from nextscale.common.precision import widen
from nextscale.config.analysis import AnalysisConfig
from nextscale.research.analysis.analyzed_model import AnalyzedModel, describe_analysis, open_models
from nextscale.research.analysis.figures import plot_expert_load
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.balance import normalise_load


def analyse_load(
    models: Sequence[str], data: str, out: Path, config: AnalysisConfig | None = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Expert load of mixtures of experts on held-out images of `data`; writes load.json and load.png into `out`.

    Returns the content of load.json. As in Table 1, loads are normalised to a sum of 64, and variances are sample
    variances (n - 1) over the experts. Raises UserError for a dense model, or for data that is not the model's.
    """
    config = config or AnalysisConfig()
    reports, device = [], find_device(config.device)
    for analyzed in open_models(models, names, data, config):
        experts, counts_SKM = analyzed.list_experts(), count_selections(analyzed)
        reports.append(_report_load(analyzed, experts, counts_SKM))
    report = {"analysis": "load", **describe_analysis(data, config, device), "models": reports}
    write_json(out / "load.json", report)
    panels = {m["name"]: (m["experts"], m["load"], m["scales"], m["load_per_scale"]) for m in reports}
    plot_expert_load(panels, sum(reports[0]["load"]), out / "load.png")
    return report


def count_selections(analyzed: AnalyzedModel) -> Tensor:
    """How many tokens of all images selected each expert, int64 (S, K, M), on the CPU."""
    spans = analyzed.model.pyramid.spans
    total: Tensor | int = 0
    for output in analyzed.run_batches():
        selected = [routing.selected_BNM.sum(dim=0) for routing in collect(output.records, "routing")]
        selected_SLM = torch.stack(selected)
        total = total + torch.stack([selected_SLM[:, start:end].sum(dim=1) for start, end in spans], dim=1)
    assert isinstance(total, Tensor), "an analysis has at least one image"
    return total.cpu()


def _report_load(analyzed: AnalyzedModel, experts: list[str], counts_SKM: Tensor) -> dict[str, Any]:
    """The loads of a model as JSON values."""
    counts = widen(counts_SKM)
    report: dict[str, Any] = {
        "name": analyzed.name,
        "router": analyzed.model.config.experts.router,
        "images": len(analyzed.rows),
        "experts": experts,
        "scales": analyzed.scales,
        "counts": counts_SKM.tolist(),
    }
    sums = {"load": counts.sum((0, 1)), "load_per_block": counts.sum(1), "load_per_scale": counts.sum(0)}
    for name, count in sums.items():
        load = normalise_load(count)
        report[name] = load.tolist()
        report[name.replace("load", "load_variance", 1)] = load.var(dim=-1, correction=1).tolist()
    return report
