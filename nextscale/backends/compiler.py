"""torch.compile, for the training of blocks."""

from __future__ import annotations

import torch
from torch import nn

_VECTOR_BITS = {"AVX512": 512, "AVX2": 256}


def compile_block(block: nn.Module) -> None:
    """`block.compile()`, for the vectors that torch itself uses on this CPU.

    torch keeps compiled code on disk. It does not distinguish there code for AVX-512 from code for AVX2 that
    ATEN_CPU_CAPABILITY asked for, and code for one in vectors of the other computes wrong numbers or crashes. The width
    of vectors, given here, is part of the key.
    """
    bits = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    if bits is not None:
        from torch._inductor import config

        config.cpp.simdlen = bits
    block.compile()
