"""Fast twin of Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.transformer.mamba import Mamba2, ScanState


class CpuMamba2(Mamba2):
    """Mamba-2, in inference one sequence at a time: batch-independent, and its values stay in the cache."""

    plain = Mamba2

    def mix(self, projected_BNJ: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        if projected_BNJ.device.type != "cpu" or torch.is_grad_enabled():
            return super().mix(projected_BNJ, state)
        pairs = zip(projected_BNJ.split(1), state.split(), strict=True)
        outputs, states = zip(*(super(CpuMamba2, self).mix(*pair) for pair in pairs), strict=True)
        return torch.cat(outputs), ScanState.join(states)
