"""Running chosen experts of one FFN and nothing else.

Several ways to the same function, `execute` takes the fastest at hand:

- a compiled kernel, on a CPU in float32 (`nextscale.backends.cpu`): rows are read and added where they lie;
- the executor that mixtures of experts use, one expert after the other, a tile of rows at a time: the tile's input and
  output stay in the cache while all experts pass over it;
- on a GPU in 16 bits that executor's grouped product;
- `masked`, which skips nothing: the reference, and what has gradients.

What costs is not the arithmetic but the bytes: gathered, multiplied and scattered, every expert moves every row through
memory. docs/dmoe.md has the arithmetic and what was measured.

A row's result is the same to the last bit whatever rows are beside it: the products promise that (`ops`, experts.c),
and the outputs of its experts are added in the experts' order.

Letters: T rows, D width, F hidden units, E experts, S hidden units of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextscale.backends.cpu import build, ops
from nextscale.backends.cpu.experts import SlicePanels, vectors_for
from nextscale.backends.cpu.ops import Linear, linear
from nextscale.transformer.feed_forward.experts import Dispatch, grouped, groups, looped

TILE_VALUES = 2**19
"""Values of a tile's input (and of its output): 2 MiB each in float32, what a core's second cache holds in part and
whose rows, of 1,024 values, are enough for products at their full speed."""
_MIN_TILE, _MAX_TILE = 256, 4096


class Slices(nn.Module):
    """The experts of an FFN, each with weights of its own, packed where `ops.pack` says so at the first use.

    Holds no parameters: they are copies in the order in which products read them, dropped when the layer moves.
    """

    may_pack = False

    def __init__(self) -> None:
        super().__init__()
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._panels: SlicePanels | None = None

    def panels(self, fc1: Linear, fc2: Linear, experts: int) -> SlicePanels | None:
        """The experts for the compiled kernel; None where weights may not be packed, or not for it."""
        if self._panels is None and self.may_pack and fc1.bias.dtype == torch.float32:
            w1, w2 = (t.to_dense() if t.is_mkldnn else t for t in (fc1.weight, fc2.weight))
            self._panels = SlicePanels(w1, fc1.bias, w2, fc2.bias, experts)
        return self._panels

    def of(self, fc1: Linear, fc2: Linear, experts: int) -> list[tuple[Tensor, Tensor]]:
        """(W1_e (S, D), W2_e (D, S)) of each expert."""
        if self._packed:
            return self._packed
        w1, w2 = (t.to_dense() if t.is_mkldnn else t for t in (fc1.weight, fc2.weight))
        pairs = list(zip(w1.chunk(experts), w2.chunk(experts, dim=1), strict=True))
        if not (self.may_pack and ops.can_pack(w1)):
            return [(a, b.contiguous()) for a, b in pairs]
        self._packed = [(ops.packed(a.contiguous()), ops.packed(b.contiguous())) for a, b in pairs]
        return self._packed

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._packed, self._panels = [], None
        return super()._apply(*arguments, **options)


def execute(x_TD: Tensor, chosen_TE: Tensor, layers: tuple[Linear, Linear], relu: bool, slices: Slices) -> Tensor:
    """b2 + sum over the chosen experts e of W2_e act(W1_e x + b1_e), (T, D).

    `layers`: fc1 and fc2, whose hidden units stand expert by expert. `relu`: the activation, else tanh-GELU.
    """
    fc1, fc2 = layers
    experts = chosen_TE.shape[1]
    differentiated = torch.is_grad_enabled() and (x_TD.requires_grad or fc1.weight.requires_grad)
    if not ops.fast or differentiated or x_TD.is_meta:
        return masked(x_TD, chosen_TE, layers, relu)
    if groups(x_TD, (fc1.out_features // experts, fc1.in_features)):
        return _grouped(x_TD, chosen_TE, layers, relu)
    size = fc1.out_features // experts
    kernels = build.load("experts", vectors_for(size)) if slices.may_pack and build.usable(x_TD, fc1.bias) else None
    panels = slices.panels(fc1, fc2, experts) if kernels is not None else None
    if kernels is not None and panels is not None:
        return panels.output(kernels, x_TD.contiguous(), chosen_TE.contiguous(), relu)
    pairs = slices.of(fc1, fc2, experts)
    bias_E = fc1.bias.chunk(experts)

    def work(j: int, rows_rD: Tensor) -> Tensor:
        a_rS = linear(rows_rD, pairs[j][0], bias_E[j], gelu=not relu)
        return linear(a_rS.relu_() if relu else a_rS, pairs[j][1])

    y_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32)).copy_(fc2.bias)
    tile = max(_MIN_TILE, min(TILE_VALUES // x_TD.shape[1], _MAX_TILE))
    for x_tD, chosen_tE, y_tD in zip(x_TD.split(tile), chosen_TE.split(tile), y_TD.split(tile), strict=True):
        looped(x_tD, Dispatch.of(chosen_tE, 0), work, into=y_tD)
    return y_TD.to(x_TD.dtype)


def _grouped(x_TD: Tensor, chosen_TE: Tensor, layers: tuple[Linear, Linear], relu: bool) -> Tensor:
    """On a GPU in 16 bits: all experts in one grouped product each way, a portion of the rows after another."""
    fc1, fc2 = layers
    experts, outs = chosen_TE.shape[1], []
    low = ops.low_precision(x_TD) or x_TD.dtype
    w1_ESD, b1_ES = (t.to(low).unflatten(0, (experts, -1)) for t in (fc1.weight, fc1.bias))
    w2_EDS = fc2.weight.to(low).unflatten(1, (experts, -1)).permute(1, 0, 2)
    for x_tD, chosen_tE in zip(x_TD.split(_MAX_TILE), chosen_TE.split(_MAX_TILE), strict=True):
        pairs = int(chosen_tE.sum())  # waits for the device: else there would be as many pairs as rows times experts
        dispatch = Dispatch.of(chosen_tE, pairs)
        outs.append(grouped(x_tD.to(low), None, dispatch, w1_ESD, b1_ES, w2_EDS, None, relu=relu))
    return torch.cat(outs) + fc2.bias


def masked(x_TD: Tensor, chosen_TE: Tensor, layers: tuple[Linear, Linear], relu: bool) -> Tensor:
    """As `execute` by running all experts and clearing the hidden units of those that are not chosen: the reference."""
    fc1, fc2 = layers
    a_TF = fc1(x_TD).relu() if relu else fc1(x_TD, gelu=True)
    return fc2(a_TF * chosen_TE.to(a_TF.dtype).repeat_interleave(a_TF.shape[1] // chosen_TE.shape[1], dim=1))
