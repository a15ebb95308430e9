"""Mamba-2 as a mixer (arXiv 2405.21060; from scale to scale in M-VAR, arXiv 2411.10433): a convolution and a scan.

It runs over the packed sequence, scale after scale, each row by row. A `ScanState` holds all that a token needs of
those before it, so the cost of a scale does not depend on how many tokens came before.

Letters: B sequences, N tokens at hand, D width, H heads, p head width, I = H p inner width, n state width,
W = I + 2 n channels of the convolution, K its taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.precision import disable_autocast
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import Mixer, ScaleContext
from nextscale.transformer.scan import count_scan_multiply_adds, scan

_NORM_EPS = 1e-5
_FIRST_STEPS = (1e-3, 0.1)
"""Range of the initial steps dt."""


@dataclass(frozen=True)
class ScanState:
    """What later tokens need of earlier ones; float32, of the same size however many there were."""

    window_BkW: Tensor
    """The last K - 1 rows that went into the convolution."""
    sums_BHpn: Tensor
    """S of the recurrence."""

    def copy_from(self, new: ScanState) -> None:
        """Take the values of another state, in place."""
        self.window_BkW.copy_(new.window_BkW)
        self.sums_BHpn.copy_(new.sums_BHpn)

    def split(self) -> list[ScanState]:
        """The state of each sequence by itself."""
        parts = zip(self.window_BkW.split(1), self.sums_BHpn.split(1), strict=True)
        return [ScanState(window, sums) for window, sums in parts]

    @staticmethod
    def join(states: Sequence[ScanState]) -> ScanState:
        """The inverse of `split`."""
        windows, sums = [s.window_BkW for s in states], [s.sums_BHpn for s in states]
        return ScanState(torch.cat(windows), torch.cat(sums))


class Mamba2(Mixer):
    """y = W_out RMSNorm(silu(z) (scan(x) + D x)), with z, x, B, C and dt from one projection; x, B and C go through a
    depthwise causal convolution and SiLU first. Parameters and shapes are those of `mamba_ssm.Mamba2`."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        mamba = config.mamba
        self.inner, self.state = mamba.expand * config.width, mamba.state_width
        self.heads = self.inner // mamba.head_width
        channels = self.inner + 2 * self.state
        self.in_proj = nn.Linear(config.width, self.inner + channels + self.heads, bias=False)
        self.conv1d = CausalConv(channels, mamba.conv_kernel)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=_NORM_EPS)
        self.out_proj = nn.Linear(self.inner, config.width, bias=False)

    def new_state(self, batch: int, length: int) -> ScanState:
        """The state before the first token, of `batch` sequences."""
        like = self.dt_bias
        window = like.new_zeros(batch, self.conv1d.taps - 1, self.inner + 2 * self.state, dtype=torch.float32)
        sums = like.new_zeros(batch, self.heads, self.inner // self.heads, self.state, dtype=torch.float32)
        return ScanState(window, sums)

    def initialize(self, generator: torch.Generator) -> None:
        """As `mamba_ssm` does; the convolution as VAR's layers."""
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16, generator=generator).log())
        low, high = _FIRST_STEPS
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(low), math.log(high), generator=generator).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.D.fill_(1)
        self.norm.weight.fill_(1)
        nn.init.trunc_normal_(self.conv1d.weight, std=0.02, generator=generator)
        self.conv1d.bias.zero_()

    def forward(self, x_BND: Tensor, context: ScaleContext, state: ScanState | None) -> Tensor:
        start = self.new_state(len(x_BND), 0) if state is None or context.span[0] == 0 else state
        y_BND, end = self.continue_from(start, x_BND)
        if state is not None:
            state.copy_from(end)
        return y_BND

    def continue_from(self, state: ScanState, x_BND: Tensor) -> tuple[Tensor, ScanState]:
        """The output (B, N, D) for tokens that follow those which left `state`, and the state after them."""
        projected_BNJ = self.in_proj(x_BND)
        with disable_autocast(x_BND):
            y_BNI, state = self.mix(projected_BNJ.float(), state)
        return self.out_proj(y_BNI.to(projected_BNJ.dtype)), state

    def mix(self, projected_BNJ: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        """Everything between the two projections, float32."""
        inner, n = self.inner, self.state
        z_BNI, raw_BNW, dt_BNH = projected_BNJ.split([inner, inner + 2 * n, self.heads], dim=-1)
        rows_BMW = torch.cat((state.window_BkW, raw_BNW), dim=1)
        x_BNI, B_BNn, C_BNn = F.silu(self.conv1d(rows_BMW)).split([inner, n, n], dim=-1)
        x_BNHp = x_BNI.unflatten(-1, (self.heads, -1))
        dt_BNH = F.softplus(dt_BNH + self.dt_bias.float())
        y_BNHp, sums_BHpn = self.scan(x_BNHp, dt_BNH, -self.A_log.float().exp(), B_BNn, C_BNn, state.sums_BHpn)
        y_BNHp = torch.addcmul(y_BNHp, x_BNHp, self.D.float().unsqueeze(-1))
        y_BNI = F.rms_norm(y_BNHp.flatten(2) * F.silu(z_BNI), (inner,), self.norm.weight.float(), _NORM_EPS)
        return y_BNI, ScanState(rows_BMW[:, raw_BNW.shape[1] :], sums_BHpn)

    def scan(
        self, x_BNHp: Tensor, dt_BNH: Tensor, A_H: Tensor, B_BNn: Tensor, C_BNn: Tensor, state_BHpn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The recurrence, see `nextscale.transformer.scan.scan`."""
        return scan(x_BNHp, dt_BNH, A_H, B_BNn, C_BNn, state_BHpn)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, tokens: int, visible: int) -> int:
        D, mamba = config.width, config.mamba
        inner = mamba.expand * D
        projections = D * (3 * inner + 2 * mamba.state_width + inner // mamba.head_width)  # in: z, x, B, C, dt; out
        return tokens * projections + count_scan_multiply_adds(tokens, inner, mamba.state_width)

    @classmethod
    def count_state_values(cls, config: TransformerConfig, cached: int) -> int:
        inner, n = config.mamba.expand * config.width, config.mamba.state_width
        return (config.mamba.conv_kernel - 1) * (inner + 2 * n) + inner * n  # the window and the sums


class CausalConv(nn.Module):
    """Depthwise convolution along the sequence, K taps, the last of them at the token itself."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, rows_BMW: Tensor) -> Tensor:
        """(B, M - K + 1, W) of M rows, the first K - 1 of which lie before the tokens at hand; float32."""
        count = rows_BMW.shape[1] - self.taps + 1
        weight_KW = self.weight.float()[:, 0].T
        y_BNW = torch.addcmul(self.bias.float(), rows_BMW[:, :count], weight_KW[0])
        for tap in range(1, self.taps):
            y_BNW.addcmul_(rows_BMW[:, tap : tap + count], weight_KW[tap])
        return y_BNW
