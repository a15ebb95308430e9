"""Settings of feed-forward layers: a mixture of experts, and dynamic experts. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.common.registry import ROUTERS
from nextscale.config.parse import check_fields

Selection = Literal["threshold", "top-k", "oracle", "pruned"]
"""How a dynamic layer selects experts: `SampleConfig.selection`."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts (MEPA, arXiv 2607.00371, Sec. 4.2): every block has FFN experts and a router."""

    router: str = "none"
    """none = no mixture. stmoe: each token selects experts, knowing its scale (Eq. 9). smoe: each scale selects them
    for all its tokens (Eq. 8). expert-choice: each expert selects tokens of an image and scale. moe++: each token
    selects, also among zero-computation experts. Or the name of a router that you registered."""
    count: int = 8
    """Number of FFN experts M, each as wide as the dense FFN."""
    active: int = 3
    """Experts m that process a token; with expert-choice, on average."""
    renormalise: bool = False
    """Divide the gates by their sum. Otherwise (Eq. 7) gates are the softmax over all experts, and those of the
    selected experts sum to less than 1."""
    scale_embedding: bool = True
    """stmoe: each layer learns a scale embedding for its router (Eq. 9). Otherwise the router sees only the level
    embedding that tokens carry."""
    zero: int = 1
    """moe++: zero-computation experts that output zero."""
    copy: int = 1
    """moe++: zero-computation experts that output their input."""
    constant: int = 2
    """moe++: zero-computation experts that output a mix of their input and a learned vector."""
    gating_residual: bool = True
    """moe++: the router also sees the scores of the previous block."""

    def __post_init__(self) -> None:
        ROUTERS.check(self.router, "experts.router")
        rules = {
            "count must be 1 to 4096": 1 <= self.count <= 4096,
            "active must be 1 to the number of experts": 1 <= self.active <= self.count + self.zero_computation,
            "zero, copy and constant must be 0 to 4096": all(
                0 <= n <= 4096 for n in (self.zero, self.copy, self.constant)
            ),
        }
        check_fields("experts", self, rules)

    @property
    def zero_computation(self) -> int:
        """Number of experts without an FFN (moe++)."""
        return self.zero + self.copy + self.constant if self.router == "moe++" else 0


@dataclass(frozen=True)
class DynamicConfig:
    """Dynamic experts: the FFN's hidden units are divided into experts, and each token runs only those it needs.

    `nextscale sparsify` makes such a model from a trained dense one (DMoE-VAR, arXiv 2510.08629). The defaults are a
    dense FFN.
    """

    experts: int = 0
    """Number of experts of equal size that the hidden units are divided into (32 of 128 in the published d16); 0 = not
    divided."""
    scales: int = 3
    """How many of the last scales are sparse. Earlier scales use the whole FFN."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation of the FFN that is divided."""
    late_ffn: bool = False
    """The sparse scales have FFNs of their own. Earlier scales keep those of the dense model, with GELU."""
    router_width: int = 128
    """Hidden width of the routers, Linear-GELU-Linear-|.|, which predict the norm of each expert's output."""
    tau: tuple[float, ...] = ()
    """Default thresholds of sampling: one for each sparse scale, coarse to fine. Empty = 1, all experts."""
    router_fingerprint: str = ""
    """Fingerprint of the FFNs that the routers were trained for; empty = they are not trained."""

    def __post_init__(self) -> None:
        rules = {
            "experts must be 0 to 2^16": 0 <= self.experts <= 2**16,
            "scales must be 0 or more": self.scales >= 0,
            "router_width must be 1 to 2^16": 1 <= self.router_width <= 2**16,
            "tau must list numbers of 0 to 1": all(0 <= tau <= 1 for tau in self.tau),
            "tau must be empty or have one number for each of the sparse scales": len(self.tau) in (0, self.scales),
            "late_ffn must be false unless the activation is relu": not self.late_ffn or self.activation == "relu",
        }
        check_fields("dynamic", self, rules)

    @property
    def on(self) -> bool:
        """Whether the FFN differs from VAR's dense one."""
        return self.experts > 0 or self.activation != "gelu" or self.late_ffn
