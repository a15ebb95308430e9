"""Settings of the transformer and of its mixers, feed-forwards and condition. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nextscale.common.errors import UserError
from nextscale.common.registry import FEED_FORWARDS, MIXERS, ROUTERS
from nextscale.config.condition import ConditionConfig
from nextscale.config.parse import Scalar, check_fields

if TYPE_CHECKING:
    from nextscale.config.idle import Idle

Selection = Literal["threshold", "top-k", "cumulative", "random", "oracle", "pruned", "pruned-activation"]
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
    """stmoe: routers add a learned scale embedding to each token (Eq. 9). Otherwise they see only the level embedding
    that tokens carry."""
    share_scale_embedding: bool = False
    """stmoe, smoe: the routers of all layers use one scale embedding. Otherwise each layer learns its own."""
    zero: int = 1
    """moe++: zero-computation experts that output zero."""
    copy: int = 1
    """moe++: zero-computation experts that output their input."""
    constant: int = 2
    """moe++: zero-computation experts that output a mix of their input and a learned vector."""
    gating_residual: bool = True
    """moe++: the router also sees the scores of the previous block."""
    capacity_factor: float = 0.0
    """moe++: an expert takes at most this many times an even share of the tokens of an image and scale, and drops later
    ones; 0 = no limit. The paper has 1.1."""
    capacity_ratio: float = 0.75
    """moe++: tokens that an FFN expert takes over those that a zero-computation expert takes (tau)."""
    exclude_zero: bool = False
    """moe++: renormalise without zero experts, as the published code: the gates of the others sum to 1."""

    def __post_init__(self) -> None:
        ROUTERS.check(self.router, "experts.router")
        rules = {
            "count must be 1 to 4096": 1 <= self.count <= 4096,
            "active must be 1 to the number of experts": 1 <= self.active <= self.count + self.zero_computation,
            "zero, copy and constant must be 0 to 4096": all(
                0 <= n <= 4096 for n in (self.zero, self.copy, self.constant)
            ),
            "capacity_factor must be 0 to 4096": 0 <= self.capacity_factor <= 4096,
            "capacity_ratio must be above 0, up to 1": 0 < self.capacity_ratio <= 1,
        }
        check_fields("experts", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        from nextscale.config import idle_experts  # sampling needs none

        return idle_experts.list_idle(self)

    def list_doubts(self) -> list[str]:
        """Values under which the router learns nothing from the cross-entropy."""
        from nextscale.config import idle_experts

        return idle_experts.list_doubts(self)

    @property
    def has_shared_scales(self) -> bool:
        """Whether the routers of all layers use one scale embedding."""
        embeds = self.scale_embedding if self.router == "stmoe" else self.router == "smoe"
        return self.share_scale_embedding and embeds

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

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if not self.experts:
            idle["the FFNs are not divided ({at}experts is 0)"] = ("router_width",)
        if not self.experts and not self.late_ffn:
            idle["no scale is sparse ({at}experts is 0)"] = ("scales",)
        return idle

    @property
    def on(self) -> bool:
        """Whether the FFN differs from VAR's dense one."""
        return self.experts > 0 or self.activation != "gelu" or self.late_ffn


MVAR_MIXERS: tuple[str, ...] = ("scale-attention", "mamba")
"""The mixers of M-VAR's blocks."""


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 between the scales (M-VAR, arXiv 2411.10433). The defaults are those of the published models."""

    state_width: int = 64
    """Width n of the state that each channel carries from token to token."""
    conv_kernel: int = 4
    """Taps of the causal convolution before the scan."""
    expand: int = 2
    """Inner width over the model's width."""
    head_width: int = 64
    """Channels that share a step size and a decay; must divide the inner width."""

    def __post_init__(self) -> None:
        values = (self.state_width, self.conv_kernel, self.expand, self.head_width)
        rule = "state_width, conv_kernel, expand and head_width must be 1 to 65536"
        check_fields("mamba", self, {rule: all(1 <= value <= 65536 for value in values)})


@dataclass(frozen=True)
class AlignmentConfig:
    """The head of semantic guidance (MEPA, Sec. 4.3): it projects a middle block's output to an encoder's features."""

    width: int = 0
    """Width of the encoder's features, 768 for a ViT-B; 0 = no head. Training sets it to the encoder's width."""
    hidden: int = 2048
    """Width of the two hidden layers of the projector, Linear-SiLU-Linear-SiLU-Linear (as REPA, arXiv 2410.06940)."""
    block: int = 0
    """The block whose output is projected, counted from 1; 0 means depth // 2."""

    def __post_init__(self) -> None:
        rules = {
            "width must be 0 to 2^20": 0 <= self.width <= 2**20,
            "hidden must be 1 to 2^20": 1 <= self.hidden <= 2**20,
            "block must be 0 or more": self.block >= 0,
        }
        check_fields("alignment", self, rules)


@dataclass(frozen=True)
class PositionConfig:
    """How a model knows where a token is, and in an image of which size. The defaults are VAR's."""

    kind: Literal["table", "rotary"] = "table"
    """table: a learned embedding of every position, resampled for other sizes. rotary: attention rotates queries and
    keys by row and column (2D RoPE), in coordinates that all scales and sizes share."""
    base: float = 100.0
    """rotary: base of the frequencies. 100 is usual for images (arXiv 2403.13298); Infinity has 10,000."""
    extent: float = 16.0
    """rotary: every map has the coordinates of a square of this side, or of a rectangle of its area."""
    size_embedding: bool = False
    """Add a learned embedding of the size and of the number of scales to the condition, so that a model that is trained
    at several sizes knows which one it draws."""

    def __post_init__(self) -> None:
        rules = {
            "base must be above 1, up to 10^6": 1 < self.base <= 1e6,
            "extent must be above 0, up to 4096": 0 < self.extent <= 4096,
        }
        check_fields("positions", self, rules)

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        return {} if self.kind == "rotary" else {"positions are a table ({at}kind)": ("base", "extent")}


@dataclass(frozen=True)
class TransformerConfig:
    """Block-causal transformer of VAR. `depth` alone gives a published model: width 64 x depth, heads = depth."""

    depth: int = 16
    """Number of blocks. A deeper model learns more from many images and takes longer."""
    width: int = 0
    """Model width D; 0 means 64 x depth."""
    heads: int = 0
    """Attention heads; 0 means depth."""
    ffn_ratio: float = 4.0
    """Hidden width of the FFN over the model's width."""
    qk_norm: bool = True
    """L2-normalise queries and keys, with a learned temperature per head. Otherwise logits are scaled by
    0.25/sqrt(d)."""
    shared_adaln: bool = False
    """One adaLN projection for all blocks, plus a learned offset per block (published 512 px model)."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms; a checkpoint needs the value that it was trained with."""
    mixers: tuple[str, ...] = ("attention",)
    """What mixes tokens in a block ahead of the FFN, in this order. attention: over all scales so far (VAR).
    scale-attention: within each scale, and mamba: from scale to scale (both M-VAR). cross-attention: to the sequence of
    the condition, such as a caption. Or names of mixers that you registered."""
    global_blocks: int = 0
    """How many of the last blocks have attention over all scales in place of the mixers (M-VAR, Fig. 5). depth or more
    means all."""
    feed_forward: str = "auto"
    """auto: mixture when experts.router is set, dynamic when dynamic experts are set, else dense. Or the name of a
    feed-forward layer that you registered."""
    positions: PositionConfig = field(default_factory=PositionConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    """Set by `nextscale sparsify`. A mixture of experts has none."""
    options: dict[str, Scalar] = field(default_factory=dict, hash=False)
    """Settings of parts that you registered, by name. nextscale itself reads none of them."""

    def __post_init__(self) -> None:
        for name, value in self.derived().items():
            object.__setattr__(self, name, getattr(self, name) or value)
        for mixer in self.mixers:
            MIXERS.check(mixer, "transformer.mixers")
        check_fields(
            "transformer",
            self,
            {
                "depth must be 1 to 1000": 1 <= self.depth <= 1000,
                "width must be 1 to 2^20": 1 <= self.width <= 2**20,
                "heads must be 1 or more": self.heads >= 1,
                "ffn_ratio must be above 0": 0 < self.ffn_ratio <= 1000,
                "norm_eps must be above 0": 0 < self.norm_eps < 1,
                "mixers must be 1 to 16 names": 1 <= len(self.mixers) <= 16,
                "global_blocks must be 0 or more": self.global_blocks >= 0,
                "mixers must not have cross-attention without a sequence: the condition is "
                f"{self.condition.describe()}": "cross-attention" not in self.mixers
                or self.condition.gives_sequence is not False,
                "shared_adaln needs as many mixers in every block: no global_blocks": not self.shared_adaln
                or len({len(self.block_mixers(i)) for i in range(self.depth)}) == 1,
            },
        )
        self._check_feed_forward()
        if "mamba" in self.mixers and self.width * self.mamba.expand % self.mamba.head_width:
            raise UserError(
                f"transformer: mamba's inner width, {self.width} x {self.mamba.expand}, must be a multiple of "
                f"mamba.head_width, {self.mamba.head_width}"
            )
        self._check_positions()
        if self.alignment.block > self.depth:
            raise UserError(f"transformer: alignment.block {self.alignment.block} is beyond the depth, {self.depth}")
        if self.width % self.heads:
            raise UserError(
                f"transformer: depth {self.depth}, width {self.width}, heads {self.heads}: "
                "width must be a multiple of heads"
            )

    def _check_positions(self) -> None:
        if self.positions.kind != "rotary":
            return
        if any(not {"attention", "scale-attention"} & {*self.block_mixers(i)} for i in range(self.depth)):
            raise UserError(
                "transformer: rotary positions are those of attention, and a block has none (mixers): use "
                "positions.kind table"
            )
        if self.width // max(self.heads, 1) % 4:
            raise UserError(
                f"transformer: rotary positions need heads of a width that is a multiple of 4; width {self.width} and "
                f"heads {self.heads} give {self.width // self.heads}"
            )

    def _check_feed_forward(self) -> None:
        FEED_FORWARDS.check(self.feed_forward, "transformer.feed_forward")
        implied = self._implied_feed_forward
        if self.feed_forward in ("dense", "mixture", "dynamic") and self.feed_forward != implied:
            raise UserError(
                f"transformer: feed_forward is {self.feed_forward}, but experts.router {self.experts.router} and the "
                f"settings of dynamic experts make it {implied}; leave feed_forward at auto"
            )
        if self.dynamic.on and self.experts.router != "none":
            raise UserError(
                f"transformer: dynamic experts inside a mixture of experts ({self.experts.router}) are not supported, "
                "as their quality was never measured: sparsify a dense model, or use the mixture without them"
            )
        if self.dynamic.experts and self.ffn_width % self.dynamic.experts:
            raise UserError(
                f"transformer: an FFN of {self.ffn_width} hidden units cannot be divided into {self.dynamic.experts} "
                "experts of one size"
            )

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        idle: dict[str, tuple[str, ...]] = {}
        if self.mixers == ("attention",):
            idle["every block has attention over all scales ({at}mixers)"] = ("global_blocks",)
        elif self.global_blocks >= self.depth:
            idle[f"{{at}}global_blocks {self.global_blocks} puts attention in every block"] = ("mixers",)
        if "mamba" not in {mixer for i in range(self.depth) for mixer in self.block_mixers(i)}:
            idle["no block has the mixer mamba"] = ("mamba",)
        return idle

    def derived(self) -> dict[str, Any]:
        """Values of the fields that are 0."""
        return {"width": 64 * self.depth, "heads": self.depth}

    def block_mixers(self, index: int) -> tuple[str, ...]:
        """The mixers of a block, counted from 0."""
        if index < self.depth - self.global_blocks:
            return self.mixers
        return ("attention", *(name for name in self.mixers if name == "cross-attention"))

    @property
    def resolved_feed_forward(self) -> str:
        """Registered name of the feed-forward layer."""
        return self._implied_feed_forward if self.feed_forward == "auto" else self.feed_forward

    @property
    def _implied_feed_forward(self) -> str:
        if self.experts.router != "none":
            return "mixture"
        return "dynamic" if self.dynamic.on else "dense"

    @property
    def ffn_width(self) -> int:
        """Hidden width of the FFN, F."""
        return round(self.width * self.ffn_ratio)

    @property
    def aligned_block(self) -> int:
        """The block, counted from 1, whose output the alignment head projects."""
        return self.alignment.block or max(self.depth // 2, 1)
