"""The state-space recurrence of Mamba-2 (arXiv 2405.21060), token by token and in chunks: one function, two ways.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t        for each head

Given the state that earlier tokens left, both go on exactly where those ended. Within a chunk of Q tokens the
recurrence is a masked product, (C B^T * decay) x, and only the state at its end goes on to the next (state-space
duality, Sec. 6): large products in place of N small steps. On a GPU where `mamba_ssm` is installed its kernel does it.

Letters: B sequences, N tokens, H heads, p head width, I = H p inner width, n state width, G chunks of Q tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.common.precision import widen

CHUNK = 64
"""Tokens of a chunk: about a head's width, where the product within a chunk costs as much as those with the state."""


def scan_by_token(
    x_BNHp: Tensor, dt_BNH: Tensor, A_H: Tensor, B_BNn: Tensor, C_BNn: Tensor, state_BHpn: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written: what `scan` is tested against. Arguments and result as there."""
    outputs = []
    for t in range(x_BNHp.shape[1]):
        added_BHpn = (dt_BNH[:, t, :, None] * x_BNHp[:, t]).unsqueeze(-1) * B_BNn[:, t, None, None]
        state_BHpn = torch.exp(dt_BNH[:, t] * A_H)[..., None, None] * state_BHpn + added_BHpn
        outputs.append((state_BHpn * C_BNn[:, t, None, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1), state_BHpn


def scan(
    x_BNHp: Tensor, dt_BNH: Tensor, A_H: Tensor, B_BNn: Tensor, C_BNn: Tensor, state_BHpn: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y (B, N, H, p) of all tokens and the state (B, H, p, n) after the last one, in chunks; all float32.

    `dt_BNH` is positive, `A_H` negative; the heads share `B_BNn` and `C_BNn`. `state_BHpn` is what earlier tokens left,
    zeros where there are none. N is 1 or more, and need not be a multiple of the chunk.
    """
    B, N, H, p = x_BNHp.shape
    Q = min(chunk, N)
    short = -N % Q
    if short:  # tokens with dt = 0 leave the state as it is
        x_BNHp, B_BNn, C_BNn, dt_BNH = (_pad_tokens(t, short) for t in (x_BNHp, B_BNn, C_BNn, dt_BNH))
    B_BGQn, C_BGQn = B_BNn.unflatten(1, (-1, Q)), C_BNn.unflatten(1, (-1, Q))
    x_BGQHp = (x_BNHp * dt_BNH.unsqueeze(-1)).unflatten(1, (-1, Q))
    # Log of the decay since the chunk began, in float64 where the device has it: what counts are small
    # differences of sums that may be large.
    log_BGQH = (widen(dt_BNH) * widen(A_H)).unflatten(1, (-1, Q)).cumsum(dim=2)
    end_BGH = log_BGQH[:, :, -1]

    y_BGQHp = _mix_within_chunks(x_BGQHp, log_BGQH, C_BGQn @ B_BGQn.transpose(2, 3))
    left_BGQH = (end_BGH.unsqueeze(2) - log_BGQH[:, :, :-1]).float().exp()  # of earlier tokens when the last comes
    left_BGQHp = x_BGQHp * F.pad(left_BGQH, (0, 0, 0, 1), value=1.0).unsqueeze(-1)
    added_BGIn = left_BGQHp.flatten(3).transpose(2, 3) @ B_BGQn
    start_BGIn, state_BIn = _carry_states(
        added_BGIn, end_BGH.float().exp().repeat_interleave(p, dim=2), state_BHpn.flatten(1, 2)
    )
    carried_BGQHp = (C_BGQn @ start_BGIn.transpose(2, 3)).view_as(x_BGQHp)
    y_BGQHp = torch.addcmul(y_BGQHp, carried_BGQHp, log_BGQH.float().exp().unsqueeze(-1))
    return y_BGQHp.flatten(1, 2)[:, :N], state_BIn.view(B, H, p, -1)


def count_scan_multiply_adds(tokens: int, inner: int, state: int, chunk: int = CHUNK) -> int:
    """Of `scan`'s products, for one sequence: with the state, and within chunks, whose masked half is computed too."""
    Q = min(chunk, tokens)
    computed = tokens + -tokens % Q
    return computed * (2 * inner * state + Q * (inner + state))


def _pad_tokens(t: Tensor, count: int) -> Tensor:
    """`count` zeros at the end of the second dimension."""
    return F.pad(t, (0, 0) * (t.ndim - 2) + (0, count))


def _mix_within_chunks(x_BGQHp: Tensor, log_BGQH: Tensor, scores_BGQQ: Tensor) -> Tensor:
    """What the tokens of each chunk receive from one another and from themselves.

    A token's own part has no decay. Were it computed as exp(log - log), the two gradients, which are equal, would leave
    nothing but their rounding errors in the sum.
    """
    log_BGHQ = log_BGQH.transpose(2, 3)
    gap_BGHQQ = (log_BGHQ.unsqueeze(-1) - log_BGHQ.unsqueeze(-2)).float()
    decay_BGHQQ = gap_BGHQQ.clamp_max(0).exp_()  # of later tokens 1, which their scores then strike out
    earlier_BGHQp = (decay_BGHQQ * scores_BGQQ.tril(-1).unsqueeze(2)) @ x_BGQHp.transpose(2, 3)
    own_BGQ = scores_BGQQ.diagonal(dim1=-2, dim2=-1)
    return torch.addcmul(earlier_BGHQp.transpose(2, 3), x_BGQHp, own_BGQ[..., None, None])


def _carry_states(added_BGIn: Tensor, decay_BGI: Tensor, state_BIn: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the start of each chunk, and the last one's end."""
    starts = []
    for added_BIn, decay_BI in zip(added_BGIn.unbind(1), decay_BGI.unbind(1), strict=True):
        starts.append(state_BIn)
        state_BIn = torch.addcmul(added_BIn, state_BIn, decay_BI.unsqueeze(-1))
    return torch.stack(starts, dim=1), state_BIn
