"""Experts on a CPU in float32 by the compiled kernels (experts.c), and their weights as those read them.

Weights of 16 bits stay so; the kernels convert them.

Letters: T rows, D width, F hidden units, E experts, S hidden units of one, R pairs of row and expert.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.backends.cpu.kernels.build import LANES, MAX_VECTORS, TYPES, get_pointers

_SLICE_ROWS, _EXPERT_ROWS = 12, 56
"""Rows that the kernels take at once, at most."""
TILE_VALUES = 2**19
"""Input values of the rows that pass over all slices together: 512 rows of width 1,024. These, as many outputs and one
slice's weights fill a second cache of 2 MiB in part; more would not save much, as weights are read once for so many."""
_TILE_ROWS = 1024
"""At most, where rows are short: weights are read seldom enough (at width 192 tiles of 2,730 rows take 8 % longer)."""

_SHARES = 4
"""Tiles of each thread where all weights fit the second cache, so that tiles may be small: rows that follow one another
have like numbers of experts, and threads would not be done together."""


def vectors_for(size: int) -> int:
    """How many vectors of outputs a kernel takes at once for experts of this size: none should be padding."""
    return MAX_VECTORS if size % (MAX_VECTORS * LANES) == 0 else 2


def to_panels(weight_EOI: Tensor, vectors: int = MAX_VECTORS) -> Tensor:
    """(E, out, in) as (E, out / panel, in, panel), outputs padded with zeros: one step after another, `vectors` vectors
    of LANES outputs in each."""
    panel = vectors * LANES
    padded = F.pad(weight_EOI.detach(), (0, 0, 0, -weight_EOI.shape[1] % panel))
    return padded.unflatten(1, (-1, panel)).transpose(2, 3).contiguous()


def from_panels(panels: Tensor, out: int) -> Tensor:
    """(E, out, in) of `to_panels`."""
    return panels.transpose(2, 3).flatten(1, 2)[:, :out].contiguous()


def _padded(bias_ES: Tensor, vectors: int) -> Tensor:
    return F.pad(bias_ES.detach(), (0, -bias_ES.shape[1] % (vectors * LANES))).contiguous()


class SlicePanels:
    """The weights of experts that are slices of one FFN.

    `w1_FD`, `b1_F`, `w2_DF`, `b2_D`: those of the whole FFN, hidden units expert by expert; biases float32.
    """

    def __init__(self, w1_FD: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor, experts: int):
        self.experts, self.width, self.size = experts, w1_FD.shape[1], w1_FD.shape[0] // experts
        vectors = vectors_for(self.size)
        self.w1 = to_panels(w1_FD.unflatten(0, (experts, -1)), vectors)
        self.w2 = to_panels(w2_DF.unflatten(1, (experts, -1)).transpose(0, 1), vectors)
        self.b1, self.b2 = _padded(b1_F.unflatten(0, (experts, -1)), vectors), b2_D.detach().contiguous()

    def output(self, kernels: ctypes.CDLL, x_TD: Tensor, chosen_TE: Tensor, relu: bool) -> Tensor:
        """The sum of the chosen experts' outputs and of the last bias, (T, D); all contiguous, float32 and bool."""
        count, threads = len(x_TD), torch.get_num_threads()
        shares = 1 if threads == 1 or self.w1.numel() + self.w2.numel() > TILE_VALUES else _SHARES
        tile = max(1, min(TILE_VALUES // self.width, _TILE_ROWS, -(-count // (shares * threads))))
        rows = torch.empty(count, dtype=torch.int64)
        converted = 0 if self.w1.dtype == torch.float32 else (self.w1.numel() + self.w2.numel()) // self.experts
        room = _SLICE_ROWS * self.b1.shape[1] + converted
        hidden = torch.empty(threads * room)
        y_TD = torch.empty_like(x_TD)
        tensors = get_pointers(x_TD, chosen_TE, y_TD, self.w1, self.b1, self.w2, self.b2)
        kernels.run_slices(
            *tensors, count, tile, self.experts, self.width, self.size, int(relu), TYPES[self.w1.dtype], threads, room,
            *get_pointers(rows, hidden),
        )  # fmt: skip
        return y_TD


class RouterPanels:
    """The weights of a router, Linear-GELU-Linear without biases: (H, D) and (E, H), converted to float32."""

    vectors = 2

    def __init__(self, w1_HD: Tensor, w2_EH: Tensor):
        (self.hidden, self.width), self.experts = w1_HD.shape, len(w2_EH)
        self.w1, self.w2 = (to_panels(w.float().unsqueeze(0), self.vectors) for w in (w1_HD, w2_EH))

    def chosen(self, kernels: ctypes.CDLL, x_TD: Tensor, tau: float) -> Tensor:
        """(T, E) bool: where p >= (1 - tau) max p, p = |W2 gelu(W1 x)|, with tanh-GELU."""
        threads, panel = torch.get_num_threads(), self.vectors * LANES
        chosen_TE = torch.empty(len(x_TD), self.experts, dtype=torch.bool)
        columns = sum(-(-n // panel) * panel for n in (self.hidden, self.experts))
        scratch = torch.empty(threads * _SLICE_ROWS * columns)
        kernels.choose_slices(
            *get_pointers(x_TD, chosen_TE, self.w1, self.w2), len(x_TD), self.experts, self.width, self.hidden,
            1 - tau, threads, *get_pointers(scratch),
        )  # fmt: skip
        return chosen_TE


def add_experts_by_kernel(
    kernels: ctypes.CDLL, x_TD: Tensor, pairs: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, ...], into: Tensor
) -> None:
    """Add to `into` (T, D) the gated outputs of whole experts, FFNs with tanh-GELU.

    `pairs`: row (R,) int64, gate (R,) float32 and where each expert's pairs end (E,) int32, sorted by expert.
    `weights`: fc1's panels, its bias (E, F), fc2's panels, its bias (E, D); panels of MAX_VECTORS vectors, both of one
    type, biases float32. All contiguous.
    """
    w1, b1_EF, w2, b2_ED = weights
    (experts, size), width, threads = b1_EF.shape, b2_ED.shape[1], torch.get_num_threads()
    b1 = _padded(b1_EF, MAX_VECTORS)
    hidden, sums = (
        torch.empty(2 * _EXPERT_ROWS * b1.shape[1]),
        torch.empty(threads * _EXPERT_ROWS * MAX_VECTORS * LANES),
    )
    tensors = get_pointers(x_TD, *pairs, into, w1, b1, w2, b2_ED)
    kernels.run_experts(*tensors, experts, width, size, TYPES[w1.dtype], threads, *get_pointers(hidden, sums))
