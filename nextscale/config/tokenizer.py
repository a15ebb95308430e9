"""Settings of the tokenizer. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nextscale.common.errors import UserError
from nextscale.config.parse import check_fields

if TYPE_CHECKING:
    from nextscale.config.idle import Idle


@dataclass(frozen=True)
class TokenizerConfig:
    """Multi-scale VQ-VAE. The defaults are the official 108.95 M parameter tokenizer (`vae_ch160v4096z32`)."""

    vocab_size: int = 4096
    """Codes in the codebook, V."""
    code_width: int = 32
    """Width of a code and of the feature map, c."""
    base_channels: int = 160
    """Channels of the CNN at full resolution. Each level multiplies them by its entry in channel_multipliers."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One level per entry. Every level but the last halves the resolution: the default downsamples 16 times."""
    res_blocks: int = 2
    """Residual blocks per level of the encoder. The decoder has one more."""
    attention: bool = True
    """Self-attention after each block of the deepest level."""
    middle_attention: bool = True
    """Self-attention in the middle of encoder and decoder."""
    norm_groups: int = 32
    """Groups of every GroupNorm; must divide all channel counts."""
    quant_conv_kernel: int = 3
    """Kernel of the convolutions before and after quantisation."""
    num_phi: int = 4
    """Convolutions phi that refine up-sampled codes. Neighbouring scales share one; K gives each scale its own, 1 is
    shared by all, 0 means none."""
    phi_ratio: float = 0.5
    """Weight r of the convolution in phi(h) = (1 - r) h + r conv(h)."""
    cosine_lookup: bool = False
    """Look up the nearest code by cosine similarity instead of Euclidean distance."""
    commitment: float = 0.25
    """Weight beta of the commitment loss."""

    def __post_init__(self) -> None:
        check_fields(
            "tokenizer",
            self,
            {
                "vocab_size must be 1 to 2^24": 1 <= self.vocab_size <= 2**24,
                "code_width must be 1 to 65536": 1 <= self.code_width <= 2**16,
                "base_channels must be 1 to 65536": 1 <= self.base_channels <= 2**16,
                "res_blocks must be 1 to 100": 1 <= self.res_blocks <= 100,
                "norm_groups must be 1 to 65536": 1 <= self.norm_groups <= 2**16,
                "channel_multipliers must be 1 to 8 numbers of 1 to 1024": 1 <= len(self.channel_multipliers) <= 8
                and 1 <= min(self.channel_multipliers) <= max(self.channel_multipliers) <= 1024,
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

    def list_idle(self) -> Idle:
        """Settings without effect, see `nextscale.config.idle`."""
        if not self.num_phi:
            return {"there is no phi ({at}num_phi is 0)": ("phi_ratio",)}
        return {} if self.phi_ratio else {"there is no phi ({at}phi_ratio is 0)": ("num_phi",)}

    @property
    def downsampling(self) -> int:
        """Pixels per cell of the finest token map, along each side."""
        return int(2 ** (len(self.channel_multipliers) - 1))
