"""Thresholds of dynamic experts in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import Selection, TransformerConfig

UNROUTED: tuple[Selection, ...] = ("oracle", "random", "pruned", "pruned-activation")
"""Selections that do not use what routers predict."""


@dataclass(frozen=True)
class Thresholds:
    """What dynamic layers receive with a pass: a threshold from 0 to 1 for each scale, and how experts are selected.

    `threshold` (DMoE-VAR, Eq. 3, in the convention of its published values): an expert runs when its predicted norm is
    at least (1 - tau) times the largest one; so 1 means all experts, 0 the largest alone. `oracle` does the same with
    the true norms. `top-k` takes the share tau of the experts, `random` as many at random, and `cumulative` the largest
    until they have the share tau of the sum of the norms. `pruned` takes the share tau of the hidden units that
    contribute most on average, `pruned-activation` those of the highest mean activation (DMoE-VAR's Pruned-FFN),
    whatever the token.
    """

    tau_K: tuple[float, ...]
    """For each scale of the pyramid."""
    selection: Selection = "threshold"
    record: Literal["", "sparsity", "norms", "contribution"] = ""
    """What the layers record instead, with all experts at work: see `nextscale.transformer.feed_forward.dynamic`."""
    seed: int = 0
    """Of `random`."""

    @staticmethod
    def create(
        config: TransformerConfig, scales: int, tau: tuple[float, ...], selection: Selection, seed: int = 0
    ) -> Thresholds:
        """From thresholds of the last scales, or one for all sparse scales. UserError where they do not fit."""
        dynamic = config.dynamic
        if not dynamic.experts:
            raise UserError(
                "tau, budget and selection need a model whose FFNs are divided into experts; this one's are not: make "
                "one with `nextscale sparsify`"
            )
        if len(tau) == 1:
            tau = tau * min(dynamic.scales, scales)
        if len(tau) > scales:
            raise UserError(f"tau lists {len(tau)} scales, the model has {scales}")
        if dynamic.late_ffn and len(tau) > dynamic.scales:
            raise UserError(
                f"tau lists {len(tau)} scales, but only the last {dynamic.scales} of this model have experts: give one "
                f"number for them all or up to {dynamic.scales}"
            )
        if selection not in UNROUTED and not dynamic.router_fingerprint and any(t < 1 for t in tau):
            raise UserError(
                "this model's routers are not trained: run `nextscale sparsify DIR --stages routers thresholds`, or "
                "choose by the true norms (selection oracle)"
            )
        return Thresholds((1.0,) * (scales - len(tau)) + tuple(tau), selection, seed=seed)


def resolve_thresholds(config: TransformerConfig, scales: int, sampling: SampleConfig) -> Thresholds | None:
    """The thresholds that these sampling settings ask for; None: a dense model, or all experts at every scale.

    Without tau the checkpoint's own is used. `budget` must have been turned into tau before (`Pipeline.sample` does).
    """
    if sampling.budget:
        raise UserError(f"budget={sampling.budget} is not yet turned into thresholds; sample through a Pipeline")
    if sampling.tau or sampling.selection != "threshold":
        if not sampling.tau:
            raise UserError(f"selection {sampling.selection} needs a tau: its share, for the last scales")
        return Thresholds.create(config, scales, sampling.tau, sampling.selection, sampling.seed)
    if not config.dynamic.tau:
        return None
    return Thresholds.create(config, scales, config.dynamic.tau, "threshold")
