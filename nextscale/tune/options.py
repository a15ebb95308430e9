"""The settings that `nextscale tune` tries, and their combinations. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from nextscale.common.dtypes import SamplingDtype
from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig

BASE_DTYPE = "float32"
_STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Guidance that ends early is also tried stronger, which makes up for some of what it loses."""
_PRUNED = ((0.5,), (0.75,), (0.4, 0.5), (0.6, 0.75), (0.75, 0.9))
"""Shares of the tokens that are left out at the last scales."""

_THRESHOLDS = (0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Option:
    """One change of the dense model's settings."""

    axis: str
    """What it changes; of an axis a combination has one option at most."""
    name: str
    """In words."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Changed fields of SampleConfig."""
    dtype: str = ""


@dataclass(frozen=True)
class Candidate:
    """A combination of options; none of them is the dense model."""

    options: tuple[Option, ...] = ()

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(option.name for option in self.options) or "dense, float32"

    @property
    def dtype(self) -> str:
        """The type to compute in."""
        return next((option.dtype for option in self.options if option.dtype), BASE_DTYPE)

    def change(self, settings: SampleConfig) -> SampleConfig:
        """The settings of the dense model with the candidate's changes. UserError where they exclude one another."""
        changes: dict[str, Any] = {}
        for option in self.options:
            changes |= option.sampling
        return replace(settings, **changes)


DENSE = Candidate()


def list_options(
    config: ModelConfig, strengths: Sequence[float], settings: SampleConfig, budgets: Sequence[float] = ()
) -> list[Option]:
    """All options for a model. `strengths`: of its guidance, by scale. `budgets`: shares of the FLOPs that its dynamic
    experts are calibrated for."""
    scales = len(config.pyramid)
    options = [Option("type", name, dtype=name) for name in get_args(SamplingDtype) if name not in ("auto", BASE_DTYPE)]
    options += _list_guidance(strengths, settings) if any(strengths) else []
    assert config.transformer is not None, "a model that samples has a transformer"
    first_block = min(3, config.transformer.depth // 4)
    for shares in _PRUNED:
        if len(shares) < scales:
            last = "last map" if len(shares) == 1 else f"last {len(shares)} maps"
            name = f"{last}: {' and '.join(f'{share * 100:g}' for share in shares)} % of the tokens left out"
            options.append(Option("tokens", name, {"prune": shares, "prune_first_block": first_block}))
    if settings.refiner:
        options += [
            Option(
                "refiner", f"refiner from scale {count + 1} on", {"refiner": settings.refiner, "draft_scales": count}
            )
            for count in range(max(1, scales - 3), scales)
        ]
    if config.transformer.dynamic.experts:
        options += _list_experts(config.transformer.dynamic, budgets)
    return options


def choose_base(config: ModelConfig, settings: SampleConfig) -> SampleConfig:
    """The settings of the dense model: dynamic experts all work."""
    assert config.transformer is not None, "a model that samples has a transformer"
    return replace(settings, tau=(1.0,)) if config.transformer.dynamic.experts else settings


def _list_experts(dynamic: DynamicConfig, budgets: Sequence[float]) -> list[Option]:
    """Dynamic experts: the model's own thresholds, and those that are calibrated; without any, one threshold."""
    own = [Option("experts", "the model's own thresholds", {"tau": ()})] if dynamic.tau else []
    if budgets:
        return own + [Option("experts", f"experts at {b:.0%} of the FLOPs", {"budget": b, "tau": ()}) for b in budgets]
    return own + [Option("experts", f"experts above threshold {tau:g}", {"tau": (tau,)}) for tau in _THRESHOLDS]


def _list_guidance(strengths: Sequence[float], settings: SampleConfig) -> list[Option]:
    """Guidance that ends after fewer scales, at the same strength and stronger; and none."""
    guided, options = max(k for k, strength in enumerate(strengths) if strength > 0) + 1, []
    for count in range(max(1, guided // 3), guided):
        if not any(strengths[:count]):
            continue
        for factor in _STRENGTHS:
            changed = tuple(round(strength * factor, 4) if k < count else 0.0 for k, strength in enumerate(strengths))
            stronger = f", {factor:g} times as strong" if factor != 1 else ""
            name = f"guidance of the first {count} of {len(strengths)} scales{stronger}"
            plain = factor == 1 and not isinstance(settings.cfg, tuple)
            options.append(Option("guidance", name, {"cfg_scales": count} if plain else {"cfg": changed}))
    return [*options, Option("guidance", "no guidance", {"cfg": 0.0})]


def combine_options(options: Sequence[Option], settings: SampleConfig) -> list[Candidate]:
    """Every combination of options of different axes, the single ones included, that settings can express."""
    axes = [[o for o in options if o.axis == axis] for axis in dict.fromkeys(option.axis for option in options)]
    candidates = []
    for chosen in itertools.product(*([None, *axis] for axis in axes)):
        candidate = Candidate(tuple(option for option in chosen if option is not None))
        try:
            candidate.change(settings)
        except UserError:
            continue
        if candidate.options:
            candidates.append(candidate)
    return candidates
