"""What linear layers in 8 bits do beside their products, by the compiled kernels (int8.c) or, without, by torch.

Letters: R rows, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.backends.cpu.kernels import build
from nextscale.tokenizer.int8 import QuantisedMap, find_range, quantise_map
from nextscale.transformer.int8 import QuantisedRows, quantise_rows


def load_int8_kernels() -> ctypes.CDLL | None:
    """The kernels, built at the first call; None where they cannot be."""
    return build.load_kernels("int8", build.MAX_VECTORS)


def quantise(x_RI: Tensor, levels: int) -> QuantisedRows:
    """`quantise_rows`."""
    kernels = load_int8_kernels()
    if kernels is None:
        return quantise_rows(x_RI, levels)
    x_RI, rows = x_RI.float().contiguous(), _create_rows(x_RI)
    kernels.quantise(
        *build.get_pointers(x_RI, rows.u_RI, rows.scale_R, rows.low_R), *x_RI.shape, levels, torch.get_num_threads()
    )
    return rows


def finish(sums_RO: Tensor, rows: QuantisedRows, total_O: Tensor, bias_O: Tensor | None, gelu: bool) -> Tensor:
    """A layer's output from the products of `rows` times the weight's scale, in place of them.

    `total_O`: the sum of each output's weights. With tanh-GELU if `gelu`.
    """
    kernels = load_int8_kernels()
    if kernels is None:
        sums_RO.mul_(rows.scale_R[:, None]).addcmul_(rows.low_R[:, None], total_O)
        y_RO = sums_RO if bias_O is None else sums_RO.add_(bias_O)
        return F.gelu(y_RO, approximate="tanh") if gelu else y_RO
    kernels.finish(
        *build.get_pointers(sums_RO, rows.scale_R, rows.low_R, total_O), _get_pointer(bias_O), sums_RO.data_ptr(),
        *sums_RO.shape, int(gelu), torch.get_num_threads(),
    )  # fmt: skip
    return sums_RO


def finish_and_quantise(
    sums_RO: Tensor, rows: QuantisedRows, total_O: Tensor, bias_O: Tensor | None, levels: int
) -> QuantisedRows:
    """`finish` with tanh-GELU, then `quantise`; overwrites `sums_RO`."""
    kernels = load_int8_kernels()
    if kernels is None:
        return quantise_rows(finish(sums_RO, rows, total_O, bias_O, True), levels)
    new = _create_rows(sums_RO)
    kernels.finish_and_quantise(
        *build.get_pointers(sums_RO, rows.scale_R, rows.low_R, total_O), _get_pointer(bias_O),
        *build.get_pointers(new.u_RI, new.scale_R, new.low_R), *sums_RO.shape, levels, torch.get_num_threads(),
    )  # fmt: skip
    return new


def quantise_image(x_1Ihw: Tensor) -> QuantisedMap:
    """`quantise_map`, of a map in float32 or bfloat16."""
    kernels = load_int8_kernels()
    known = x_1Ihw.dtype in (torch.float32, torch.bfloat16)
    if kernels is None or not known or x_1Ihw.numel() % build.LANES:
        return quantise_map(x_1Ihw)
    x_1hwI = x_1Ihw.permute(0, 2, 3, 1).contiguous()
    scale, zero = find_range(x_1hwI)
    u_1hwI = torch.empty_like(x_1hwI, dtype=torch.uint8)
    kernels.quantise_map(
        *build.get_pointers(x_1hwI, u_1hwI), x_1hwI.numel(), 1 / scale, zero, build.TYPES[x_1hwI.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return QuantisedMap(u_1hwI.permute(0, 3, 1, 2), scale, zero)


def _create_rows(x_RI: Tensor) -> QuantisedRows:
    return QuantisedRows(torch.empty(x_RI.shape, dtype=torch.uint8), torch.empty(len(x_RI)), torch.empty(len(x_RI)))


def _get_pointer(bias_O: Tensor | None) -> int | None:
    return None if bias_O is None else build.get_pointers(bias_O)[0]
