"""Where a token is in its map, at any size: tables that are resampled, rotary positions, and an embedding of the size.

Letters: B batch, N tokens at hand, L tokens of all scales, D width, H heads, d head width, f = d / 2 frequencies.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.precision import cast_for
from nextscale.config.transformer import PositionConfig
from nextscale.pyramid import Pyramid, Side, match_scales

_PERIODS = (2.0, 4.0, 8.0, 16.0)
"""Of the sines of a size, in octaves: sizes of 1 to 4096 have the logarithms 0 to 12."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of N positions, float32 (N, f) each."""


def resample_map(embedding_1ND: Tensor, old: Side, new: Side) -> Tensor:
    """Resample a map of embeddings (1, N, D) to other sides, bicubically; unchanged when the sides are equal."""
    if old == new:
        return embedding_1ND
    map_1Dhw = embedding_1ND.float().transpose(1, 2).unflatten(-1, old)
    resized = F.interpolate(map_1Dhw, new, mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(embedding_1ND.dtype).contiguous()


def resample_table(table_1LD: Tensor, old: Pyramid, new: Pyramid) -> Tensor:
    """The embeddings (1, L, D) of all positions for another pyramid: each of its maps is resampled from the map of
    `old` at the same relative place between the first scale and the last."""
    if old == new:
        return table_1LD
    maps = []
    for side, j in zip(new.sides, match_scales(old, new), strict=True):
        start, end = old.spans[j]
        maps.append(resample_map(table_1LD[:, start:end], old.sides[j], side))
    return torch.cat(maps, dim=1)


@lru_cache(maxsize=32)
def compute_rotation(pyramid: Pyramid, config: PositionConfig, head_width: int, device: torch.device) -> Rotation:
    """The rotation of every position of a pyramid, (L, f) each: half of the frequencies for rows, half for columns.

    Coordinates are those of a cell's centre, scaled so that every map covers the same area, `extent` squared, in the
    proportions of the last map. So a cell of a coarse map has the coordinates of the finer cells under it, and a size
    between two others has coordinates between theirs. (STAR, arXiv 2406.10797, and Infinity, arXiv 2412.04431, scale
    them to the last map, from its first corner, which makes larger images larger in coordinates.)
    """
    ratio = math.sqrt(pyramid.last[0] / pyramid.last[1])
    height, width = config.extent * ratio, config.extent / ratio
    with torch.inference_mode(False):  # it may be used in training later
        count = head_width // 4
        frequency_q = config.base ** -(torch.arange(count, dtype=torch.float64) / count)
        places = []
        for h, w in pyramid.sides:
            rows_h, columns_w = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (h, w))
            grid = torch.cartesian_prod(rows_h * height, columns_w * width)
            places.append(grid.view(h * w, 2))
        angle_Lf = (torch.cat(places)[:, :, None] * frequency_q).flatten(1)
        return angle_Lf.cos().float().to(device), angle_Lf.sin().float().to(device)


def rotate(x_BHNd: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys rotated: value i and value i + f are the coordinates of a vector in the plane. Their lengths stay
    as they are. Computed in float32."""
    cos_Nf, sin_Nf = rotation
    a, b = x_BHNd.float().chunk(2, dim=-1)
    return torch.cat((a * cos_Nf - b * sin_Nf, b * cos_Nf + a * sin_Nf), dim=-1).to(x_BHNd.dtype)


class SizeEmbedding(nn.Module):
    """What is added to the condition of an image of a size: a projection of sines of the logarithms of the height and
    the width of the last map and of the number of scales. It starts at zero.

    As the size conditioning of SDXL (arXiv 2307.01952), and as Infinity's embedding of a schedule of scales, which has
    a row for each known one; sizes between known ones have sines between theirs.
    """

    features = 3 * 2 * len(_PERIODS)

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(self.features, width)

    def finish_initialization(self, spread: float) -> None:
        """Zero: a new model does not know sizes."""
        self.project.weight.zero_()

    def forward(self, pyramid: Pyramid) -> Tensor:
        """(1, D)."""
        sines = compute_sines(pyramid, self.project.weight.device)
        return self.project(cast_for(self.project, sines))


@lru_cache(maxsize=32)
def compute_sines(pyramid: Pyramid, device: torch.device) -> Tensor:
    """The features of a size, float32 (1, 24). Copied to the device once."""
    with torch.inference_mode(False):
        values = torch.tensor([*pyramid.last, len(pyramid)], dtype=torch.float64).log2()
        phase = 2 * math.pi * values[:, None] / torch.tensor(_PERIODS, dtype=torch.float64)
        return torch.cat((phase.sin(), phase.cos())).float().view(1, -1).to(device)
