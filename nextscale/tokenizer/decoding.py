"""How many images the decoder takes at once on a GPU, so that its memory is bounded whatever the batch."""

from __future__ import annotations

import torch

from nextscale.config.tokenizer import TokenizerConfig

_LIVE_MAPS = 5
"""As many of the largest maps live at the same time: a level's input, and four in a residual block."""
_SHARE = 0.5
"""Share of the free memory for maps; convolutions need some beside them."""


def estimate_decoder_bytes(config: TokenizerConfig, latent: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the maps that the decoder holds at its peak for an image whose feature map has this (height, width)."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    deepest = len(widths) - 1
    cells = [latent[0] * latent[1] * 4 ** (deepest - i) for i in range(len(widths))]
    # the first block of a level takes the channels of the deeper one
    largest = max(n * max(widths[i], widths[min(i + 1, deepest)]) for i, n in enumerate(cells))
    return _LIVE_MAPS * largest * dtype.itemsize


def count_at_once(config: TokenizerConfig, latent: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """How many images fit into the free memory of a CUDA device, at least 1. `latent` as above."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return choose_at_once(free, estimate_decoder_bytes(config, latent, dtype))


def choose_at_once(free: int, image: int) -> int:
    """How many images of so many bytes may be decoded at once with so many bytes free."""
    return max(1, int(_SHARE * free) // image)
