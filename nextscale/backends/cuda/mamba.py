"""Mamba-2 with the scan of `mamba_ssm`, where that is installed. It needs CUDA and Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from torch import Tensor

from nextscale.transformer.mamba import Mamba2

_KERNEL_CHUNK = 256


class CudaMamba2(Mamba2):
    """Mamba-2 by `mamba_chunk_scan_combined`; without `mamba_ssm`, as its plain twin."""

    plain = Mamba2

    def scan(
        self, x_BNHp: Tensor, dt_BNH: Tensor, A_H: Tensor, B_BNn: Tensor, C_BNn: Tensor, state_BHpn: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernel = load_scan_kernel() if x_BNHp.device.type == "cuda" else None
        if kernel is None:
            return super().scan(x_BNHp, dt_BNH, A_H, B_BNn, C_BNn, state_BHpn)
        return scan_by_kernel(kernel, x_BNHp, dt_BNH, A_H, B_BNn, C_BNn, state_BHpn)


@lru_cache(maxsize=1)
def load_scan_kernel() -> Callable[..., Any] | None:
    """`mamba_chunk_scan_combined`, or None where `mamba_ssm` is not installed."""
    try:
        module = import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError:
        return None
    kernel: Callable[..., Any] = module.mamba_chunk_scan_combined
    return kernel


def scan_by_kernel(
    kernel: Callable[..., Any], x_BNHp: Tensor, dt_BNH: Tensor, A_H: Tensor, B_BNn: Tensor, C_BNn: Tensor,
    state_BHpn: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scan` by a function with the signature of `mamba_ssm`'s kernel, which knows groups of heads: here one."""
    y_BNHp, state_BHpn = kernel(
        x_BNHp, dt_BNH, A_H, B_BNn.unsqueeze(2), C_BNn.unsqueeze(2), _KERNEL_CHUNK,
        initial_states=state_BHpn, return_final_states=True,
    )  # fmt: skip
    return y_BNHp, state_BHpn.float()
