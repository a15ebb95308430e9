"""Settings of dynamic feed-forward layers. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.config.parse import check_fields

Selection = Literal["threshold", "top-k", "oracle", "pruned"]


@dataclass(frozen=True)
class DynamicConfig:
    """An FFN whose hidden units are divided into experts, of which each token uses those that matter to it.

    `nextscale sparsify` makes it of a trained dense model (DMoE-VAR, arXiv 2510.08629); the defaults are a dense FFN.
    """

    experts: int = 0
    """Experts that the FFN's hidden units are divided into, all of one size (32 of 128 in the published d16); 0 = not
    divided."""
    scales: int = 3
    """How many of the last scales are sparse; all before them use the whole FFN."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of the FFN that is divided."""
    own: bool = False
    """The sparse scales have FFNs of their own; those before them keep the dense model's, with GELU."""
    router_width: int = 128
    """Hidden width of the routers, Linear-GELU-Linear-|.|, which predict the norm of each expert's output."""
    tau: tuple[float, ...] = ()
    """What sampling uses unless it is told otherwise: one for each sparse scale, coarse to fine. Empty = 1, all
    experts."""
    identity: str = ""
    """Checksum of the FFNs that the routers were trained for; empty = they are not trained."""

    def __post_init__(self) -> None:
        rules = {
            "experts must be 0 to 2^16": 0 <= self.experts <= 2**16,
            "scales must be 0 or more": self.scales >= 0,
            "router_width must be 1 to 2^16": 1 <= self.router_width <= 2**16,
            "tau must list numbers of 0 to 1": all(0 <= tau <= 1 for tau in self.tau),
            "tau must be empty or have one number for each of the sparse scales": len(self.tau) in (0, self.scales),
            "own must be false unless the activation is relu": not self.own or self.activation == "relu",
        }
        check_fields("dynamic", self, rules)

    @property
    def on(self) -> bool:
        """Whether the FFN is another than VAR's."""
        return self.experts > 0 or self.activation != "gelu" or self.own
