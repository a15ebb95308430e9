"""Mamba-2 as a mixer (arXiv 2405.21060; from scale to scale in M-VAR, arXiv 2411.10433): a convolution and a scan.

It runs over the packed sequence, scale after scale, each row by row. All that a token needs of those before it is a
`ScanState`, so a scale costs what its own tokens cost, however many came before.

Letters: B sequences, N tokens at hand, D width, H heads, p head width, I = H p inner width, n state width,
W = I + 2 n channels of the convolution, K its taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu.ops import Linear, full_precision
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.scan import fastest_scan

_NORM_EPS = 1e-5


@dataclass(frozen=True)
class ScanState:
    """What later tokens need of earlier ones; float32, of the same size however many there were."""

    window_BkW: Tensor
    """The last K - 1 rows that went into the convolution."""
    sums_BHpn: Tensor
    """S of the recurrence."""

    def keep(self, new: ScanState) -> None:
        """Take the values of another state, in place."""
        self.window_BkW.copy_(new.window_BkW)
        self.sums_BHpn.copy_(new.sums_BHpn)

    def split(self) -> list[ScanState]:
        """The state of each sequence by itself."""
        parts = zip(self.window_BkW.split(1), self.sums_BHpn.split(1), strict=True)
        return [ScanState(window, sums) for window, sums in parts]

    @staticmethod
    def joined(states: Sequence[ScanState]) -> ScanState:
        """What `split` took apart."""
        windows, sums = [s.window_BkW for s in states], [s.sums_BHpn for s in states]
        return ScanState(torch.cat(windows), torch.cat(sums))


class Mamba2(nn.Module):
    """y = W_out RMSNorm(silu(z) (scan(x) + D x)), with z, x, B, C and dt from one projection; x, B and C go through a
    depthwise causal convolution and SiLU first. Parameters and shapes are those of `mamba_ssm.Mamba2`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        mamba = config.mamba
        self.inner, self.state = mamba.expand * config.width, mamba.state_width
        self.heads = self.inner // mamba.head_width
        channels = self.inner + 2 * self.state
        self.in_proj = Linear(config.width, self.inner + channels + self.heads, bias=False)
        self.conv1d = CausalConv(channels, mamba.conv_kernel)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=_NORM_EPS)
        self.out_proj = Linear(self.inner, config.width, bias=False)

    @property
    def outputs(self) -> list[Linear]:
        """The last projection, which writes to the residual stream."""
        return [self.out_proj]

    def new_state(self, batch: int, length: int) -> ScanState:
        """The state before the first token, of `batch` sequences."""
        like = self.dt_bias
        window = like.new_zeros(batch, self.conv1d.taps - 1, self.inner + 2 * self.state, dtype=torch.float32)
        sums = like.new_zeros(batch, self.heads, self.inner // self.heads, self.state, dtype=torch.float32)
        return ScanState(window, sums)

    def forward(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, None]:
        kept: ScanState | None = context.state
        past = self.new_state(len(x_BND), 0) if kept is None or context.span[0] == 0 else kept
        y_BND, state = self.continued(x_BND, past)
        if kept is not None:
            kept.keep(state)
        return y_BND, None

    def continued(self, x_BND: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        """What the tokens give (B, N, D), after those that left `state`, and the state that they leave."""
        projected_BNJ = self.in_proj(x_BND)
        with full_precision(x_BND):
            if x_BND.device.type != "cpu" or torch.is_grad_enabled():
                y_BNI, state = self._mixed(projected_BNJ.float(), state)
            else:  # one sequence at a time: the same bits whatever shares the batch, and it stays in the cache
                pairs = zip(projected_BNJ.float().split(1), state.split(), strict=True)
                ys, states = zip(*(self._mixed(*pair) for pair in pairs), strict=True)
                y_BNI, state = torch.cat(ys), ScanState.joined(states)
        return self.out_proj(y_BNI.to(projected_BNJ.dtype)), state

    def _mixed(self, projected_BNJ: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        """From the first projection to what the last one takes, float32."""
        inner, n = self.inner, self.state
        z_BNI, raw_BNW, dt_BNH = projected_BNJ.split([inner, inner + 2 * n, self.heads], dim=-1)
        rows_BMW = torch.cat((state.window_BkW, raw_BNW), dim=1)
        x_BNI, B_BNn, C_BNn = F.silu(self.conv1d(rows_BMW)).split([inner, n, n], dim=-1)
        x_BNHp = x_BNI.unflatten(-1, (self.heads, -1))
        dt_BNH = F.softplus(dt_BNH + self.dt_bias.float())
        y_BNHp, sums_BHpn = fastest_scan(x_BNHp, dt_BNH, -self.A_log.float().exp(), B_BNn, C_BNn, state.sums_BHpn)
        y_BNHp = torch.addcmul(y_BNHp, x_BNHp, self.D.float().unsqueeze(-1))
        y_BNI = F.rms_norm(y_BNHp.flatten(2) * F.silu(z_BNI), (inner,), self.norm.weight.float(), _NORM_EPS)
        return y_BNI, ScanState(rows_BMW[:, raw_BNW.shape[1] :], sums_BHpn)


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
