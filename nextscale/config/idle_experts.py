"""Settings of a mixture of experts that have no effect, or under which its router learns nothing: the methods of
`ExpertsConfig` that `nextscale.config.idle` asks for. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale.config.idle import Idle
    from nextscale.config.transformer import ExpertsConfig


def list_idle(config: ExpertsConfig) -> Idle:
    """Settings without effect, see `nextscale.config.idle`."""
    capacity = ("capacity_factor", "capacity_ratio")
    moe_plus_plus = ("zero", "copy", "constant", "gating_residual", *capacity, "exclude_zero")
    if config.router == "none":
        names = ("count", "active", "renormalise", "scale_embedding", "share_scale_embedding", *moe_plus_plus)
        return {"there is no mixture of experts ({at}router is none)": names}
    idle: dict[str, tuple[str, ...]] = {}
    if config.router in ("stmoe", "smoe", "expert-choice"):
        idle["it belongs to the router moe++"] = moe_plus_plus
    if config.router in ("smoe", "expert-choice", "moe++"):
        idle["it belongs to the router stmoe"] = ("scale_embedding",)
    if not replace(config, share_scale_embedding=True).has_shared_scales:
        idle["it belongs to the routers stmoe, with {at}scale_embedding, and smoe"] = ("share_scale_embedding",)
    if config.router == "moe++" and not config.capacity_factor:
        idle["experts take any number of tokens ({at}capacity_factor is 0)"] = ("capacity_ratio",)
    if config.router == "moe++" and not (config.renormalise and config.zero):
        idle["no zero expert is part of a renormalisation ({at}renormalise, {at}zero)"] = ("exclude_zero",)
    return idle


def list_doubts(config: ExpertsConfig) -> list[str]:
    """Values under which the router learns nothing from the cross-entropy."""
    token_choice = config.router in ("stmoe", "smoe", "moe++")
    doubts = {
        "{at}count 1: the router has nothing to choose from": config.router != "none"
        and config.count + config.zero_computation == 1,
        "{at}renormalise with {at}active 1: every gate is 1, so the router learns from the load-balance loss "
        "alone": token_choice and config.renormalise and config.active == 1 and config.count > 1,
        "{at}active selects all experts: nothing is routed, and a dense FFN as wide computes as much": token_choice
        and 1 < config.active == config.count + config.zero_computation,
    }
    return [doubt for doubt, applies in doubts.items() if applies]
