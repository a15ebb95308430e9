"""The convolutional encoder and decoder of the tokenizer: VQGAN's, as VAR uses it.

Letters: B batch, C channels, h w sides of a map. Each level but the deepest halves (encoder) or doubles (decoder) the
resolution; residual blocks use GroupNorm and SiLU; self-attention stands at the deepest level and in the middle.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.config.tokenizer import TokenizerConfig


class SiLU(nn.SiLU):
    """SiLU; in place where no gradient needs the input, as new memory costs more than the arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.silu = SiLU()

    def forward(self, x_BChw: Tensor) -> Tensor:
        y = self.conv1(self.silu(self.norm1(x_BChw)))
        y = self.conv2(self.silu(self.norm2(y)))
        return self.shortcut(x_BChw) + y


class MapAttention(nn.Module):
    """Single-head self-attention over all cells of a map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        B, C, h, w = x_BChw.shape
        qkv = self.qkv(self.norm(x_BChw)).reshape(B, 3, 1, C, h * w).transpose(-1, -2)
        y = self.attention(*qkv.unbind(1))  # (B, 1, hw, C)
        return x_BChw + self.proj(y.transpose(-1, -2).reshape(B, C, h, w).contiguous())

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention, (B, 1, hw, C)."""
        return F.scaled_dot_product_attention(q, k, v)


class Level(nn.Module):
    """Residual blocks at one resolution, with attention after each where asked for, then a change of resolution."""

    def __init__(self, channels: list[int], groups: int, attention: bool, resample: nn.Module):
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairs)
        self.attentions = nn.ModuleList(MapAttention(b, groups) for _, b in pairs if attention)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


class Downsample(nn.Conv2d):
    """Stride-2 3x3 convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


def build_middle(channels: int, config: TokenizerConfig) -> nn.Sequential:
    """The middle of encoder and decoder: two residual blocks, with self-attention between them if configured."""
    groups = config.norm_groups
    attention = MapAttention(channels, groups) if config.middle_attention else nn.Identity()
    return nn.Sequential(
        ResidualBlock(channels, channels, groups), attention, ResidualBlock(channels, channels, groups)
    )


class Encoder(nn.Module):
    """Image (B, 3, H, W) to feature map (B, c, h, w)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        deepest = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.levels = nn.Sequential()
        before = config.base_channels
        for i, width in enumerate(widths):
            channels = [before] + [width] * config.res_blocks
            last = i == deepest
            resample = nn.Identity() if last else Downsample(width)
            self.levels.append(Level(channels, config.norm_groups, config.attention and last, resample))
            before = width
        self.middle = build_middle(before, config)
        self.norm_out, self.silu = nn.GroupNorm(config.norm_groups, before, eps=1e-6), SiLU()
        self.conv_out = nn.Conv2d(before, config.code_width, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(image_B3HW)))
        return self.conv_out(self.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Feature map (B, c, h, w) to image (B, 3, H, W). Levels are kept in the order they run, deepest first."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, self.int8 = config, False  # True: `nextscale.tokenizer.int8` has quantised it
        widths = [config.base_channels * m for m in config.channel_multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.code_width, before, 3, padding=1)
        self.middle = build_middle(before, config)
        self.levels = nn.Sequential()
        for i, width in reversed(list(enumerate(widths))):
            channels = [before] + [width] * (config.res_blocks + 1)
            resample = Upsample(width) if i else nn.Identity()
            deepest = i == len(widths) - 1
            self.levels.append(Level(channels, config.norm_groups, config.attention and deepest, resample))
            before = width
        self.norm_out, self.silu = nn.GroupNorm(config.norm_groups, before, eps=1e-6), SiLU()
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, features_BChw: Tensor) -> Tensor:
        x = self.levels(self.middle(self.conv_in(features_BChw)))
        return self.conv_out(self.silu(self.norm_out(x)))
