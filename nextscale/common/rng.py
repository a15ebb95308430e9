"""Random numbers that are derived from a seed and a purpose, never from earlier draws.

`make_generator(seed, "order", epoch)` gives the same stream at every call, so a resumed run needs no stored generator
state. `draw_words` computes each number from its place (stream, row, index) alone, on any device, in integers, so that
a CPU and a GPU give the same bits: sampling uses it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def fold_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose under `seed`: equal arguments give equal numbers on every machine."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose under `seed`."""
    return torch.Generator().manual_seed(fold_seed(seed, *purpose))


def compute_philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words for each
    counter.

    Words are 32 bits, held in int64; the tensors of the counter are broadcast against one another. A product of two
    words may exceed 63 bits and wraps around, which keeps its bits.
    """
    a, b, c, d = counter
    (step_a, step_c), (key_a, key_c) = _KEY_STEPS, key
    for _ in range(_ROUNDS):
        product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = ((product_c >> 32) ^ (b ^ key_a)) & _MASK, ((product_a >> 32) ^ (d ^ key_c)) & _MASK
        b, d = product_c, product_a  # only their low words count, which are cut out at the end
        key_a, key_c = (key_a + step_a) & _MASK, (key_c + step_c) & _MASK
    return a, b & _MASK, c, d & _MASK


def draw_words(seed: int, streams_S: Tensor, rows: range, count: int) -> Tensor:
    """Random words, int64 (streams, rows, count) of 0 to 2^32 - 1, on the device of `streams_S`.

    Word i of row r of a stream depends on (seed, stream, r, i) alone. `seed`: 0 to 2^64 - 1. `streams_S`: the numbers
    of the streams, int64, 0 or more. Rows and indices lie below 2^32.
    """
    device = streams_S.device
    block_Q = torch.arange(-(-count // 4), device=device)  # four words each
    row_R1 = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
    stream_S11 = streams_S.view(-1, 1, 1)
    words = compute_philox((block_Q, row_R1, stream_S11 & _MASK, stream_S11 >> 32), (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(2)[..., :count]
