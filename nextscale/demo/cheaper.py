"""The same pictures at less cost: ways to turn a model's work down, each beside the full model with equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.profile import list_profiles, read_profile
from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import Growth, Request, format_flops, format_seconds, grow
from nextscale.demo.models import Model, Models
from nextscale.research.analysis.dynamic import ExpertMaps, map_experts
from nextscale.sampling.thresholds import read_budgets

THRESHOLD, BUDGET = "Fewer experts: threshold", "Fewer experts: budget"
PRUNE, GUIDE, INT8 = "Leave out tokens of the last scale", "Guide the early scales only", "Compute in 8 bits"
PROFILE = "Profile "


@dataclass(frozen=True)
class Amounts:
    """How far each way turns the work down; those of other ways are not used."""

    tau: float = 0.5
    budget: float = 0.8
    prune: float = 0.5
    guided: int = 3


@dataclass(frozen=True)
class Comparison:
    """What there is of the full model and the reduced one, of one request."""

    full: Growth | None = None
    reduced: Growth | None = None
    maps: ExpertMaps | None = None
    """Of the first picture, where dynamic experts were turned down."""

    def list_rows(self) -> list[list[str]]:
        """Heads, then a row for each: time, images a second, FLOPs, and their shares of the full model's."""
        rows = [["", "time", "share of the time", "images a second", "FLOPs an image", "share of the FLOPs"]]
        done = [(name, g) for name, g in (("full", self.full), ("reduced", self.reduced)) if g is not None and g.done]
        for name, growth in done:
            dense = done[0][1]
            rows.append(
                [
                    name, format_seconds(growth.seconds), f"{growth.seconds / dense.seconds:.0%}",
                    f"{growth.images_per_second:.3g}", format_flops(growth.flops), f"{growth.flops / dense.flops:.0%}",
                ]
            )  # fmt: skip
        return rows


def has_experts(model: Model) -> bool:
    """Whether the model has dynamic experts."""
    return model.pipeline.transformer.config.dynamic.experts > 0


def find_budgets(model: Model) -> tuple[float, float] | None:
    """The smallest and the largest share of the FLOPs for which thresholds were calibrated; None where none were."""
    shares = [row.share for row in read_budgets(model.origin)] if has_experts(model) else []
    return (min(shares), max(shares)) if shares else None


def list_ways(model: Model) -> list[str]:
    """What can be turned down in this model."""
    experts = [THRESHOLD, *([BUDGET] if find_budgets(model) else [])] if has_experts(model) else []
    return [*experts, PRUNE, GUIDE, INT8, *(PROFILE + name for name in list_profiles(model.folder))]


def explain_ways(model: Model) -> str:
    """What the model offers, in words."""
    if has_experts(model):
        return (
            "This model has dynamic experts: each position can do without the experts that would add little. The "
            "threshold decides how many work; a budget uses thresholds that were calibrated for it."
        )
    return (
        "This model has no dynamic experts (`nextscale sparsify` adds them). It can leave out tokens, guide fewer "
        "scales, compute in 8 bits on a CPU, or use a profile that `nextscale tune` found."
    )


def choose_cheaper(models: Models, source: str, way: str, request: Request, amounts: Amounts) -> tuple[Model, Request]:
    """The model and the request with its work turned down. UserError when the way does not fit the model."""
    model = models.load(source)
    settings = use_all_experts(model, request.settings)
    change: dict[str, Callable[[], SampleConfig]] = {
        THRESHOLD: lambda: replace(settings, tau=(amounts.tau,)),
        BUDGET: lambda: replace(settings, tau=(), budget=amounts.budget),
        PRUNE: lambda: replace(settings, prune=(amounts.prune,), prune_first_block=min(3, _count_blocks(model) - 1)),
        GUIDE: lambda: replace(settings, cfg_scales=amounts.guided),
        INT8: lambda: settings,
    }
    if way in change:
        model = models.load(source, "int8") if way == INT8 else model
        return model, replace(request, settings=change[way]())
    folder = model.folder
    if not way.startswith(PROFILE):
        raise UserError("choose what to turn down")
    profile = models.run(lambda: read_profile(folder, way.removeprefix(PROFILE)))
    settings = replace(profile.settings, seed=settings.seed)
    return models.load(source, profile.dtype), replace(request, settings=settings)


def compare_cost(models: Models, source: str, way: str, request: Request, amounts: Amounts) -> Iterator[Comparison]:
    """Sample a request with the full model and with its work turned down, yielding what there is after each scale.

    Both are run twice in turn, and the faster of the two runs counts: the first one prepares what is kept.
    """
    model = models.load(source)
    full = replace(request, settings=use_all_experts(model, request.settings))
    cheaper, reduced = choose_cheaper(models, source, way, request, amounts)
    found = Comparison()
    for side, each, asked in 2 * (("full", model, full), ("reduced", cheaper, reduced)):
        for growth in models.iterate(grow(each, asked)):
            before: Growth | None = getattr(found, side)
            if before is None or not before.done or (growth.done and growth.seconds < before.seconds):
                change: dict[str, Any] = {side: growth}
                found = replace(found, **change)
            yield found
    if has_experts(model) and way in (THRESHOLD, BUDGET):
        with suppress(UserError):  # all experts work everywhere
            maps = models.run(lambda: map_experts(cheaper.pipeline, cheaper.give(reduced.asked[:1]), reduced.settings))
            found = replace(found, maps=maps)
    yield found


def use_all_experts(model: Model, settings: SampleConfig) -> SampleConfig:
    """The settings of the full model: all dynamic experts, where the checkpoint has thresholds of its own."""
    return replace(settings, tau=(1.0,), budget=0.0) if has_experts(model) else settings


def _count_blocks(model: Model) -> int:
    return model.pipeline.transformer.config.depth
