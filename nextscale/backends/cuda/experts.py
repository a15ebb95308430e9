"""Fast twin of the experts of a mixture on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.backends.experts import can_group, run_experts
from nextscale.transformer.feed_forward.experts import Dispatch, Experts


class CudaExperts(Experts):
    """In 16 bits all experts in one grouped product, without waiting for the host; in training with the backward pass
    written out."""

    plain = Experts

    def run(self, x_TD: Tensor, gate_R: Tensor, dispatch: Dispatch) -> Tensor:
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gate_R, *self.weights))
        if gradient or can_group(x_TD, (self.fc1.weight.shape[1], self.fc1.weight.shape[2])):
            return run_experts(x_TD, gate_R, dispatch, self.weights)
        return super().run(x_TD, gate_R, dispatch)
