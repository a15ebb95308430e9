"""Fast twin of dynamic experts on a GPU: kernels that compute the selected experts and nothing else.

Letters: T rows, D width, E experts, S hidden units of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.backends.cuda.tiles import TorchProducts, load_products, plan_tiles
from nextscale.backends.dynamic import SparseDynamicFeedForward
from nextscale.backends.experts import find_low_precision
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.experts import Dispatch


class CudaDynamicFeedForward(SparseDynamicFeedForward):
    """The kernels read rows where they are and add results where they belong, and no size depends on the selection: so
    nothing waits for the device. Without Triton, and with gradients, as on any device."""

    plain = DynamicFeedForward

    def run_experts(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        fc1, fc2 = self.divided
        products, experts = load_products(x_TD.device), selected_TE.shape[1]
        gradient = torch.is_grad_enabled() and (x_TD.requires_grad or fc1.weight.requires_grad)
        if gradient or x_TD.is_meta or isinstance(products, TorchProducts):
            return super().run_experts(x_TD, selected_TE, relu)
        low = find_low_precision(x_TD) or x_TD.dtype
        w1_ESD, b1_ES = (t.to(low).unflatten(0, (experts, -1)) for t in (fc1.weight, fc1.bias))
        w2_EDS = fc2.weight.to(low).unflatten(1, (experts, -1)).permute(1, 0, 2)
        pairs = Dispatch.create(selected_TE, selected_TE.numel())
        tiles = plan_tiles(pairs.ends_M, len(pairs.row_R))
        a_RS = products.multiply(x_TD.to(low), w1_ESD, tiles, pairs.row_R, b1_ES, "relu" if relu else "gelu")
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32) + fc2.bias
        return products.multiply(a_RS, w2_EDS, tiles, pairs.row_R, into=y_TD).to(x_TD.dtype)
