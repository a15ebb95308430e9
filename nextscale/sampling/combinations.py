"""Which settings of the sampler cannot be combined, each with the reason. Everything else works together.

Every refusal involves prune, a refiner, official seeding or captured graphs; without them nothing needs to be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import TransformerConfig


@dataclass(frozen=True)
class Request:
    """What one call of the sampler combines."""

    settings: SampleConfig
    model: TransformerConfig
    refiner: TransformerConfig | None = None
    first_image: int = 0
    captured: bool = False
    fixed_experts: bool = False
    """Whether dynamic experts below tau 1 run in fixed shapes."""


def _has_unprunable_layers(model: TransformerConfig) -> bool:
    """Whether a layer may need all tokens of a scale, or the record that the block before made of the same tokens."""
    mixers, feed_forwards = {"attention", "scale-attention", "cross-attention"}, {"dense", "mixture", "dynamic"}
    routers = {"none", "smoe", "stmoe", "moe++", "expert-choice"}
    known = mixers >= set(model.mixers) and model.resolved_feed_forward in feed_forwards
    return not known or model.experts.router not in routers


def _prunes_scored_tokens(request: Request) -> bool:
    """Whether a block that MoE++'s gating residual reaches is pruned."""
    experts, first_block = request.model.experts, max(request.settings.prune_first_block, 1)
    residual = experts.router == "moe++" and experts.gating_residual
    return bool(request.settings.prune) and residual and request.model.depth > first_block


def _runs_few_experts(request: Request) -> bool:
    tau = request.settings.tau or request.model.dynamic.tau
    return bool(request.settings.budget) or min(tau, default=1) < 1


REFUSED: tuple[tuple[Callable[[Request], bool], str], ...] = (
    (
        lambda r: bool(r.settings.prune) and _has_unprunable_layers(r.model),
        "prune cannot work with mamba, whose state runs through every token, and is not known to work with layers of "
        "your own; sample without prune",
    ),
    (
        lambda r: bool(r.settings.prune) and r.model.positions.kind == "rotary",
        "prune cannot work with rotary positions: attention would rotate the tokens that are left by the positions of "
        "others; sample without prune",
    ),
    (
        _prunes_scored_tokens,
        "prune cannot work with MoE++'s gating residual: a router uses the scores of the block before, and blocks "
        "compute different tokens; sample without prune, or train with experts.gating_residual false",
    ),
    (
        lambda r: bool(r.settings.prune) and r.refiner is not None,
        "draft_scales and prune cannot be combined: the refiner reads all tokens in one pass",
    ),
    (
        lambda r: bool(r.settings.draft_scales) and r.refiner is None,
        "draft_scales needs a refiner: a second model for the later scales",
    ),
    (
        lambda r: r.settings.official_seeding and r.first_image != 0,
        "official_seeding draws all images from one generator, so they cannot start at image number first_image: "
        "sample all in one call",
    ),
    (
        lambda r: r.captured and bool(r.settings.prune),
        "captured steps cannot be combined with prune: sample without capture, or without prune",
    ),
    (
        lambda r: r.captured and r.refiner is not None,
        "captured steps cannot be combined with a refiner: sample without capture, or without the refiner",
    ),
    (
        lambda r: r.captured and _runs_few_experts(r) and not r.fixed_experts,
        "captured steps have fixed shapes, but dynamic experts below tau 1 have them only on a GPU with Triton: sample "
        "without capture, or with tau 1",
    ),
)
"""(whether it applies, reason)."""


def find_refusal(request: Request) -> str:
    """The reason for the first combination that is refused; empty if there is none."""
    return next((reason for applies, reason in REFUSED if applies(request)), "")


def check_combinations(request: Request) -> None:
    """UserError with the reason for the first combination that is refused."""
    reason = find_refusal(request)
    if reason:
        raise UserError(reason)
