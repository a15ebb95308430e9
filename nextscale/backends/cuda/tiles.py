"""Products of groups of rows with a matrix each, without waiting for the device: the rows in tiles of one size.

Each tile belongs to one group. Their number follows from the number of rows and of groups, so no size depends on how
the rows are divided; tiles that are not needed are empty. `load_products` gives the kernels of
`nextscale.backends.cuda.kernels` where Triton is installed, and otherwise the functions of this file, which gather each
tile's rows and matrix for torch's batched product.

Letters: R rows, sorted by group; M groups; t tiles of b rows; K input width, N output width; T rows before they are
gathered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_SIZES = (16, 32, 64, 128)
"""Rows of a tile. The smallest is what a tensor core takes."""
_AT_ONCE = 16
"""Tiles whose matrices are gathered together."""

Activation = Literal["", "relu", "gelu"]


@dataclass(frozen=True)
class Tiles:
    """Which rows each tile has: those of group_t from start_t to end_t - 1, none where start_t >= end_t."""

    group_t: Tensor
    start_t: Tensor
    end_t: Tensor
    """int32, all three."""
    size: int
    """b, the most rows of a tile."""
    ends_M: Tensor
    """int32: where the rows of each group end. Rows after the last end belong to none."""


class Products(Protocol):
    """The two products."""

    def multiply(
        self, x: Tensor, weight_MNK: Tensor, tiles: Tiles, row_R: Tensor, bias_MN: Tensor | None = None,
        activation: Activation = "", gate_R: Tensor | None = None, *, into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """act(W_m x + b_m) of each row, m being its group, times its gate.

        Without `into`: x (T, K) is read at row_R, and the result is (R, N) in x's dtype; rows of no group are arbitrary
        there. With `into` (T, N), float32: x is (R, K), the result is added to `into` at row_R, and `into` returned.
        """

    def add_outer_products(self, g_RN: Tensor, x_RK: Tensor, tiles: Tiles) -> Tensor:
        """The gradient (M, N, K) of the matrices: the sum of g_r x_r^T over the rows r of each group, in x's dtype."""


def plan_tiles(ends_M: Tensor, rows: int) -> Tiles:
    """The tiles of so many rows, of which those of group m end at ends_M[m]."""
    groups = len(ends_M)
    size = next((s for s in _SIZES if s * groups >= rows), _SIZES[-1])
    begin_M = torch.cat((ends_M.new_zeros(1), ends_M[:-1]))
    tiles_M = (ends_M - begin_M + (size - 1)) // size
    last_M = tiles_M.cumsum(0)
    tile_t = torch.arange(-(-rows // size) + groups, device=ends_M.device)
    group_t = torch.searchsorted(last_M, tile_t, right=True).clamp_max(groups - 1)
    start_t = begin_M[group_t] + (tile_t - (last_M - tiles_M)[group_t]) * size
    end_t = torch.minimum(start_t + size, ends_M[group_t])
    return Tiles(group_t.int(), start_t.int(), end_t.int(), size, ends_M)


def load_products(device: torch.device) -> Products:
    """The kernels on a GPU where Triton is installed, else the functions of this file.

    With TRITON_INTERPRET=1 the kernels run on a CPU too, slowly.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _load_kernels() if (device.type == "cuda") != interpreted else TorchProducts()


@lru_cache(maxsize=1)
def _load_kernels() -> Products:
    try:
        from nextscale.backends.cuda import kernels
    except ImportError:
        return TorchProducts()
    return kernels.TritonProducts()


class TorchProducts:
    """The products by torch alone."""

    def multiply(
        self, x: Tensor, weight_MNK: Tensor, tiles: Tiles, row_R: Tensor, bias_MN: Tensor | None = None,
        activation: Activation = "", gate_R: Tensor | None = None, *, into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = len(row_R)
        out = x.new_zeros(rows + 1, weight_MNK.shape[1]) if into is None else into  # the last row: of empty places
        for part in _split(tiles):
            place_tb, valid_tb1, group_t = _find_places(part, rows)
            x_tbK = x[row_R[place_tb] if into is None else place_tb]
            y_tbN = torch.bmm(x_tbK, weight_MNK[group_t].mT)
            y_tbN = y_tbN if bias_MN is None else y_tbN + bias_MN[group_t].unsqueeze(1)
            y_tbN = activate(y_tbN, activation)
            y_tbN = y_tbN if gate_R is None else y_tbN * gate_R[place_tb].unsqueeze(-1)
            if into is None:
                target_tb = torch.where(valid_tb1.squeeze(-1), place_tb, rows)
                out.index_copy_(0, target_tb.flatten(), y_tbN.flatten(0, 1).to(out.dtype))
            else:
                y_tbN = torch.where(valid_tb1, y_tbN.to(into.dtype), 0)
                into.index_add_(0, row_R[place_tb].flatten(), y_tbN.flatten(0, 1))
        return out[:rows] if into is None else into

    def add_outer_products(self, g_RN: Tensor, x_RK: Tensor, tiles: Tiles) -> Tensor:
        M, (R, N), K = len(tiles.ends_M), g_RN.shape, x_RK.shape[1]
        total_MNK = torch.zeros(M, N, K, dtype=torch.float32, device=x_RK.device)
        for part in _split(tiles):
            place_tb, valid_tb1, group_t = _find_places(part, R)
            g_tbN, x_tbK = (torch.where(valid_tb1, rows[place_tb], 0) for rows in (g_RN, x_RK))
            total_MNK.index_add_(0, group_t, torch.bmm(g_tbN.mT, x_tbK).float())
        return total_MNK.to(x_RK.dtype)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The hidden units."""
    if activation == "relu":
        return x.relu()
    return F.gelu(x, approximate="tanh") if activation == "gelu" else x


def _split(tiles: Tiles) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    parts = (t.split(_AT_ONCE) for t in (tiles.group_t, tiles.start_t, tiles.end_t))
    return [(group_t, start_t, end_t, tiles.size) for group_t, start_t, end_t in zip(*parts, strict=True)]


def _find_places(part: Any, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of each tile (t, b), within 0 to `rows` - 1; which are there (t, b, 1); and the groups."""
    group_t, start_t, end_t, size = part
    place_tb = start_t.long().unsqueeze(1) + torch.arange(size, device=start_t.device)
    return place_tb.clamp_max(max(rows - 1, 0)), (place_tb < end_t.unsqueeze(1)).unsqueeze(-1), group_t.long()
