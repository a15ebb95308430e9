"""Fast twin of dynamic experts: runs the selected experts and nothing else, on any device.

- The loop over experts that mixtures use, a tile of rows at a time: the tile's input and output stay in the cache while
  all experts pass over it.
- On a GPU the kernels of `nextscale.backends.cuda.dynamic`; without Triton in bfloat16 all experts in one grouped
  product.
- With gradients as the plain twin, which computes all experts.

The bytes cost more than the arithmetic: gathered, multiplied and scattered, every expert moves every row through
memory. docs/dmoe.md has the arithmetic and what was measured.

Letters: T rows, D width, F hidden units, E experts, S hidden units of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.backends.cpu.experts import create_dispatch
from nextscale.backends.cpu.linear import apply_gelu_linear
from nextscale.backends.cpu.products import linear
from nextscale.backends.experts import can_group, find_low_precision, run_grouped
from nextscale.common.precision import compute_exactly, is_computed_in_float32
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward, ExpertRouter
from nextscale.transformer.feed_forward.experts import add_experts

TILE_VALUES = 2**19
"""Values of a tile's input (and of its output): 2 MiB each in float32, what a core's second cache holds in part and
whose rows, of 1,024 values, are enough for products at their full speed."""
_MIN_TILE, _MAX_TILE = 256, 4096


class SparseDynamicFeedForward(DynamicFeedForward):
    """A dynamic feed-forward that skips the experts that are not selected."""

    plain = DynamicFeedForward

    def activate(self, fc1: nn.Linear, x: Tensor, relu: bool) -> Tensor:
        return super().activate(fc1, x, relu) if relu else apply_gelu_linear(fc1, x)

    def run_experts(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        fc1 = self.divided[0]
        gradient = torch.is_grad_enabled() and (x_TD.requires_grad or fc1.weight.requires_grad)
        if gradient or x_TD.is_meta:
            return super().run_experts(x_TD, selected_TE, relu)
        if can_group(x_TD, (fc1.out_features // selected_TE.shape[1], fc1.in_features)):
            return self._run_grouped(x_TD, selected_TE, relu)
        return self.loop_over_experts(x_TD, selected_TE, relu)

    def loop_over_experts(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        """One expert after the other, a tile of rows at a time; a row does not depend on the rows beside it."""
        fc1, fc2 = self.divided
        experts = selected_TE.shape[1]
        weights, bias_E = self.slice_weights(experts), fc1.bias.chunk(experts)

        def run_expert(expert: int, rows_rD: Tensor) -> Tensor:
            a_rS = linear(rows_rD, weights[expert][0], bias_E[expert], gelu=not relu)
            return linear(a_rS.relu_() if relu else a_rS, weights[expert][1])

        y_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32)).copy_(fc2.bias)
        tile = max(_MIN_TILE, min(TILE_VALUES // x_TD.shape[1], _MAX_TILE))
        for x_tD, selected_tE, y_tD in zip(x_TD.split(tile), selected_TE.split(tile), y_TD.split(tile), strict=True):
            add_experts(x_tD, create_dispatch(selected_tE, selected_tE.numel()), run_expert, into=y_tD)
        return y_TD.to(x_TD.dtype)

    def slice_weights(self, experts: int) -> list[tuple[Tensor, Tensor]]:
        """(W1_e (S, D), W2_e (D, S)) of each expert."""
        w1, w2 = (self.get_weight(layer) for layer in self.divided)
        pairs = zip(w1.chunk(experts), w2.chunk(experts, dim=1), strict=True)
        return [(a, b if is_computed_in_float32(b) else b.contiguous()) for a, b in pairs]  # one is copied at its use

    def run_units(self, x_TD: Tensor, units: Tensor, relu: bool) -> Tensor:
        fc1, fc2 = self.divided
        a_Tn = linear(x_TD, self.get_weight(fc1)[units], fc1.bias[units], gelu=not relu)
        return linear(a_Tn.relu() if relu else a_Tn, self.get_weight(fc2)[:, units].contiguous(), fc2.bias)

    def _run_grouped(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        """All experts in one grouped product each way, some thousand rows at a time."""
        (fc1, fc2), experts, outputs = self.divided, selected_TE.shape[1], []
        low = find_low_precision(x_TD) or x_TD.dtype
        w1_ESD, b1_ES = (t.to(low).unflatten(0, (experts, -1)) for t in (fc1.weight, fc1.bias))
        w2_EDS = fc2.weight.to(low).unflatten(1, (experts, -1)).permute(1, 0, 2)
        for x_tD, selected_tE in zip(x_TD.split(_MAX_TILE), selected_TE.split(_MAX_TILE), strict=True):
            pairs = int(selected_tE.sum())  # waits for the device: else there would be rows times experts pairs
            dispatch = create_dispatch(selected_tE, pairs)
            outputs.append(run_grouped(x_tD.to(low), None, dispatch, w1_ESD, b1_ES, w2_EDS, None, relu=relu))
        return torch.cat(outputs) + fc2.bias


class CpuExpertRouter(ExpertRouter):
    """The router with GELU fused into its first product."""

    plain = ExpertRouter

    def forward(self, x: Tensor) -> Tensor:
        with compute_exactly(x):
            hidden = linear(x.float(), self.fc1.weight.float(), gelu=True)
            return linear(hidden, self.fc2.weight.float()).abs()
