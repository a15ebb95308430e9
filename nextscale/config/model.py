"""The config tree: dataclasses of settings. Needs no torch.

One `ModelConfig` describes a whole generator (pyramid, tokenizer, transformer) and is what `config.json` holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nextscale.common.errors import UserError
from nextscale.config.dynamic import DynamicConfig
from nextscale.config.parse import check_fields
from nextscale.pyramid import PYRAMID_256, Pyramid


@dataclass(frozen=True)
class TokenizerConfig:
    """Multi-scale VQ-VAE. The defaults are the official 108.95 M parameter tokenizer (`vae_ch160v4096z32`)."""

    vocab_size: int = 4096
    """Codes in the codebook, V."""
    code_width: int = 32
    """Width of a code and of the feature map, c."""
    base_channels: int = 160
    """Channels of the CNN at full resolution; each level multiplies them."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One level per entry; every level but the last halves the resolution, so the default reduces 16 times."""
    res_blocks: int = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    attention: bool = True
    """Self-attention after each block of the deepest level."""
    middle_attention: bool = True
    """Self-attention in the middle of encoder and decoder."""
    norm_groups: int = 32
    """Groups of every GroupNorm; must divide all channel counts."""
    quant_conv_kernel: int = 3
    """Kernel of the convolutions before and after quantisation."""
    num_phi: int = 4
    """Convolutions that refine up-sampled codes: shared by all scales, one per scale (K of them), 1, or 0 for none."""
    phi_ratio: float = 0.5
    """Share of the convolution in phi(h) = (1 - r) h + r conv(h)."""
    cosine_lookup: bool = False
    """Nearest code by cosine instead of Euclidean distance."""
    commitment: float = 0.25
    """Weight beta of the commitment loss."""

    def __post_init__(self) -> None:
        check_fields(
            "tokenizer",
            self,
            {
                "vocab_size, code_width, base_channels, res_blocks and norm_groups must be 1 to 2^24": all(
                    1 <= n <= 2**24
                    for n in (self.vocab_size, self.code_width, self.base_channels, self.res_blocks, self.norm_groups)
                ),
                "channel_multipliers must be 1 to 8 positive numbers": 1 <= len(self.channel_multipliers) <= 8
                and min(self.channel_multipliers) >= 1,
                "quant_conv_kernel must be odd": 1 <= self.quant_conv_kernel <= 99 and self.quant_conv_kernel % 2 == 1,
                "num_phi must be 0 to 1000": 0 <= self.num_phi <= 1000,
                "phi_ratio must lie in 0 to 1": 0 <= self.phi_ratio <= 1,
                "commitment must be 0 or more": 0 <= self.commitment < math.inf,
            },
        )
        for multiplier in self.channel_multipliers:
            if (self.base_channels * multiplier) % self.norm_groups:
                raise UserError(
                    f"tokenizer: {self.base_channels} x {multiplier} channels cannot be divided into "
                    f"norm_groups={self.norm_groups}; change base_channels or norm_groups"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per cell of the finest token map, along each side."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class ClassConditionConfig:
    """The image is conditioned on a class label."""

    kind: Literal["class"] = "class"
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_fields("condition", self, {"num_classes must be 1 to 2^24": 1 <= self.num_classes <= 2**24})


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts (MEPA, arXiv 2607.00371, Sec. 4.2): FFN experts and a router in every block."""

    router: Literal["none", "stmoe", "smoe", "expert-choice", "moe++"] = "none"
    """Who chooses: each token, knowing its scale (stmoe, Eq. 9); each scale, for all its tokens (smoe, Eq. 8); each
    expert, among the tokens of an image and scale (expert-choice); each token, also among idle experts (moe++). none:
    a dense FFN."""
    count: int = 8
    """FFN experts M, each as wide as the dense FFN."""
    active: int = 3
    """Experts m that work on a token; with expert-choice on average."""
    renormalise: bool = False
    """Divide the gates by their sum. Otherwise (Eq. 7) they are the softmax over all experts as it is, and sum to
    less than 1."""
    scale_embedding: bool = True
    """stmoe: an own scale embedding per layer (Eq. 9); without it, the one that tokens carry has to do."""
    zero: int = 1
    """moe++: experts that return nothing."""
    copy: int = 1
    """moe++: experts that return their input."""
    constant: int = 2
    """moe++: experts that mix their input and a learned vector."""
    gating_residual: bool = True
    """moe++: the router also sees the scores of the block before."""

    def __post_init__(self) -> None:
        rules = {
            "count must be 1 to 4096": 1 <= self.count <= 4096,
            "active must be 1 to the number of experts": 1 <= self.active <= self.count + self.idle,
            "zero, copy and constant must be 0 to 4096": all(
                0 <= n <= 4096 for n in (self.zero, self.copy, self.constant)
            ),
        }
        check_fields("experts", self, rules)

    @property
    def idle(self) -> int:
        """Experts without an FFN."""
        return self.zero + self.copy + self.constant if self.router == "moe++" else 0


Mixer = Literal["attention", "scale-attention", "mamba"]
MVAR_MIXERS: tuple[Mixer, ...] = ("scale-attention", "mamba")
"""The mixers of M-VAR's blocks."""


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 between the scales (M-VAR, arXiv 2411.10433). The defaults are those of the published models."""

    state_width: int = 64
    """Width n of the state that each channel carries from token to token."""
    conv_kernel: int = 4
    """Taps of the causal convolution before the scan."""
    expand: int = 2
    """Inner width over the model's."""
    head_width: int = 64
    """Channels that share a step and a decay; must divide the inner width."""

    def __post_init__(self) -> None:
        values = (self.state_width, self.conv_kernel, self.expand, self.head_width)
        rule = "state_width, conv_kernel, expand and head_width must be 1 to 65536"
        check_fields("mamba", self, {rule: all(1 <= value <= 65536 for value in values)})


@dataclass(frozen=True)
class AlignmentConfig:
    """The head of semantic guidance (MEPA, Sec. 4.3): from a middle block's output to an encoder's features."""

    width: int = 0
    """Width of the encoder's features, 768 of a ViT-B; 0 = no head. In training it follows from the encoder."""
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
class TransformerConfig:
    """Block-causal transformer of VAR. `depth` alone gives a published model: width 64 x depth, heads = depth."""

    depth: int = 16
    width: int = 0
    """Model width D; 0 means 64 x depth."""
    heads: int = 0
    """Attention heads; 0 means depth."""
    ffn_ratio: float = 4.0
    """Hidden width of the feed-forward layer over the model's."""
    qk_norm: bool = True
    """L2-normalised queries and keys with a learned temperature per head; otherwise logits scale by 0.25/sqrt(d)."""
    shared_adaln: bool = False
    """One adaLN projection for all blocks plus a learned offset per block (published 512 px model)."""
    norm_eps: float = 1e-6
    mixers: tuple[Mixer, ...] = ("attention",)
    """What mixes tokens in a block, in this order, ahead of the FFN: attention to all scales so far (VAR); or
    scale-attention, within each scale, and mamba, from scale to scale (M-VAR)."""
    global_blocks: int = 0
    """Blocks, the last ones, that have attention to all scales in place of the mixers (M-VAR's Fig. 5); depth or more
    means all."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    condition: ClassConditionConfig = field(default_factory=ClassConditionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    """What `nextscale sparsify` makes of dense FFNs. A mixture of experts has none."""

    def __post_init__(self) -> None:
        for name, value in self.derived().items():
            object.__setattr__(self, name, getattr(self, name) or value)
        check_fields(
            "transformer",
            self,
            {
                "depth must be 1 to 1000": 1 <= self.depth <= 1000,
                "width must be 1 to 2^20": 1 <= self.width <= 2**20,
                "heads must be 1 or more": self.heads >= 1,
                "ffn_ratio must be above 0": 0 < self.ffn_ratio <= 1000,
                "norm_eps must be above 0": 0 < self.norm_eps < 1,
                "mixers must be one or more of attention, scale-attention, mamba": 1 <= len(self.mixers) <= 16,
                "global_blocks must be 0 or more": self.global_blocks >= 0,
                "shared_adaln needs as many mixers in every block: no global_blocks": not self.shared_adaln
                or len({len(self.block_mixers(i)) for i in range(self.depth)}) == 1,
            },
        )
        self._check_dynamic()
        if "mamba" in self.mixers and self.width * self.mamba.expand % self.mamba.head_width:
            raise UserError(
                f"transformer: mamba's inner width, {self.width} x {self.mamba.expand}, must be a multiple of "
                f"mamba.head_width, {self.mamba.head_width}"
            )
        if self.alignment.block > self.depth:
            raise UserError(f"transformer: alignment.block {self.alignment.block} is beyond the depth, {self.depth}")
        if self.width % self.heads:
            raise UserError(
                f"transformer: depth {self.depth}, width {self.width}, heads {self.heads}: "
                "width must be a multiple of heads"
            )

    def _check_dynamic(self) -> None:
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

    def derived(self) -> dict[str, Any]:
        """What fields that are 0 become."""
        return {"width": 64 * self.depth, "heads": self.depth}

    def block_mixers(self, index: int) -> tuple[Mixer, ...]:
        """The mixers of a block, counted from 0."""
        return self.mixers if index < self.depth - self.global_blocks else ("attention",)

    @property
    def ffn_width(self) -> int:
        """Hidden width of the FFN, F."""
        return round(self.width * self.ffn_ratio)

    @property
    def aligned_block(self) -> int:
        """The block, counted from 1, whose output the alignment head projects."""
        return self.alignment.block or max(self.depth // 2, 1)


@dataclass(frozen=True)
class ModelConfig:
    """A whole generator, or a tokenizer alone when `transformer` is None."""

    pyramid: Pyramid = PYRAMID_256
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    transformer: TransformerConfig | None = field(default_factory=TransformerConfig)
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty when unknown."""

    def __post_init__(self) -> None:
        classes = self.transformer.condition.num_classes if self.transformer else len(self.class_names)
        if self.class_names and len(self.class_names) != classes:
            raise UserError(f"config has {len(self.class_names)} class names for {classes} classes")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        h, w = self.pyramid.last
        return h * self.tokenizer.downsampling, w * self.tokenizer.downsampling

    @property
    def square_side(self) -> int:
        """Side of the images in pixels, as data sets are read; UserError when they are not square."""
        height, width = self.image_size
        if height != width:
            raise UserError(f"data sets are read as square images; this model wants {height} x {width}")
        return height

    def summary(self) -> str:
        """One line for people: classes, scales, size of the images."""
        height, width = self.image_size
        what = f"{self.transformer.condition.num_classes} classes" if self.transformer else "a tokenizer alone"
        return f"{what}, scales {self.pyramid}, images of {height} x {width} pixels"


@dataclass(frozen=True)
class InitConfig:
    """Scales of VAR's initialisation. The published recipes lower `adaln_gamma` with depth (1e-3 for d16)."""

    adaln: float = 0.5
    adaln_gamma: float = 1e-3
    head: float = 0.02
