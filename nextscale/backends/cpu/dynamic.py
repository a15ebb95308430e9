"""Fast twins of dynamic experts for inference on a CPU: packed slices and compiled kernels.

Packed weights are copies in the order in which products read them; they are no parameters, and dropped when the layer
moves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.experts import RouterPanels, SlicePanels, vectors_for
from nextscale.backends.cpu.products import can_pack, pack_weight, unpack_weight
from nextscale.backends.dynamic import CpuExpertRouter, SparseDynamicFeedForward


class PackedDynamicFeedForward(SparseDynamicFeedForward):
    """By a compiled kernel in float32, which reads and adds rows where they are; else by packed products."""

    slices: list[tuple[Tensor, Tensor]] | None = None
    panels: SlicePanels | None = None

    def get_weight(self, layer: nn.Linear) -> Tensor:
        return unpack_weight(layer.weight)

    def loop_over_experts(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        fc1, fc2 = self.divided
        experts = selected_TE.shape[1]
        kernels = None
        if build.can_use_kernels(x_TD, fc1.weight, converts=True):
            kernels = build.load_kernels("experts", vectors_for(fc1.out_features // experts))
        if kernels is None:
            return super().loop_over_experts(x_TD, selected_TE, relu)
        if self.panels is None:
            self.panels = SlicePanels(self.get_weight(fc1), fc1.bias, self.get_weight(fc2), fc2.bias, experts)
        return self.panels.output(kernels, x_TD.contiguous(), selected_TE.contiguous(), relu)

    def slice_weights(self, experts: int) -> list[tuple[Tensor, Tensor]]:
        if self.slices is None:
            weights = super().slice_weights(experts)
            if not can_pack(weights[0][0]):
                return weights
            self.slices = [(pack_weight(a.contiguous()), pack_weight(b)) for a, b in weights]
        return self.slices

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.slices = self.panels = None
        return super()._apply(*arguments, **options)


class PackedExpertRouter(CpuExpertRouter):
    """The router with selection in one compiled kernel."""

    panels: RouterPanels | None = None

    def select(self, x_TD: Tensor, tau: float, selection: str) -> Tensor:
        usable = selection == "threshold" and 0 < tau < 1
        usable = usable and build.can_use_kernels(x_TD, self.fc1.weight, converts=True)
        kernels = build.load_kernels("experts", RouterPanels.vectors) if usable else None
        if kernels is None:
            return super().select(x_TD, tau, selection)
        if self.panels is None:
            self.panels = RouterPanels(self.fc1.weight, self.fc2.weight)
        return self.panels.chosen(kernels, x_TD.contiguous(), tau)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.panels = None
        return super()._apply(*arguments, **options)
