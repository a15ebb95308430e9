"""Fast twins of layers with adapters, for training: see `nextscale.transformer.lora`."""

from __future__ import annotations

from nextscale.backends.cpu.experts import CpuStackedLinear
from nextscale.backends.cpu.linear import CpuLinear
from nextscale.transformer.lora import LoraLinear, LoraStackedLinear


class CpuLoraLinear(LoraLinear, CpuLinear):  # type: ignore[override]
    """A linear layer with an adapter, by `products.linear`."""

    plain = LoraLinear


class CpuLoraStackedLinear(LoraStackedLinear, CpuStackedLinear):  # type: ignore[misc]
    """The linear layers of experts with adapters, by `products.linear`."""

    plain = LoraStackedLinear
