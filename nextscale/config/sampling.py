"""Settings of sampling. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.config.feed_forward import Selection
from nextscale.config.parse import check_fields


@dataclass(frozen=True)
class SampleConfig:
    """How logits become an image. The defaults are VAR's published evaluation setting."""

    cfg: float = 1.5
    """Classifier-free guidance: strength at the last scale; it grows linearly from 0 at the first. 0 = off."""
    top_k: int = 900
    """Keep the k most likely tokens; 0 = off."""
    top_p: float = 0.96
    """Keep the most likely tokens that together have this probability; 0 = off."""
    temperature: float = 1.0
    """Divides the guided logits before anything is filtered."""
    seed: int = 0
    smooth: bool = False
    """Paint with a Gumbel-softmax mixture of codes: nicer pictures, not for measuring."""
    official_seeding: bool = False
    """One generator for the whole call, as the official code: its tokens, but an image depends on its batch."""
    refiner: str = ""
    """A second checkpoint, as a rule of a smaller model, that draws the late scales (collaborative decoding, CoDe)."""
    draft_scales: int = 0
    """With a refiner: scales that the first model draws before it takes over (CoDe's N; 8 of 10 in its paper)."""
    prune: tuple[float, ...] = ()
    """Share of tokens left out at each of the last scales (FastVAR), coarse to fine: 0.4 0.5. Empty = none."""
    prune_first_block: int = 3
    """Blocks before this one compute all tokens even so."""
    tau: tuple[float, ...] = ()
    """Dynamic experts (`nextscale sparsify`): a threshold for each of the last scales, coarse to fine, or one for all
    sparse scales. An expert runs when its predicted norm is at least (1 - tau) times the largest: 1 = all, 0 = one.
    Empty = the model's own."""
    budget: float = 0.0
    """Dynamic experts: the tau that was calibrated for this share of the dense model's FLOPs; 0 = off."""
    selection: Selection = "threshold"
    """Dynamic experts, to compare with: oracle = tau on the true norms; top-k = the share tau of the experts; pruned =
    the share tau of the hidden units, the same for every token."""

    def __post_init__(self) -> None:
        rules = {
            "cfg must be 0 to 1000": 0 <= self.cfg <= 1000,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must lie in 0 (off) to 1": 0 <= self.top_p <= 1,
            "temperature must be 0.001 to 1000 (for the likeliest token use top_k=1)": 1e-3 <= self.temperature <= 1e3,
            "seed must lie in 0 to 2^63 - 1": 0 <= self.seed < 2**63,
            "draft_scales must be 0 or more": self.draft_scales >= 0,
            "prune must list shares of 0 to below 1": all(0 <= ratio < 1 for ratio in self.prune),
            "prune_first_block must be 0 or more": self.prune_first_block >= 0,
            "draft_scales and prune cannot be combined": not (self.draft_scales and self.prune),
            "tau must list numbers of 0 to 1": all(0 <= tau <= 1 for tau in self.tau),
            "budget must lie in 0 (off) to 1": 0 <= self.budget <= 1,
            "budget and tau cannot be combined": not (self.budget and self.tau),
        }
        check_fields("sampling", self, rules)
