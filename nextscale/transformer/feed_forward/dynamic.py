"""The feed-forward layer whose hidden units are divided into experts.

The division is a permutation of the dense layer's hidden units: expert e has rows e S to (e + 1) S of fc1 and the same
columns of fc2. So the dense layer is one product each way, and the bias of fc2 is added once:

    y = b2 + sum over the experts e that run of W2_e act(W1_e x + b1_e)

What a pass did comes back as its record (`nextscale.transformer.feed_forward.records`).

Letters: B sequences, N tokens at hand, T rows, D width, F hidden units, E experts, S hidden units of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.backends.cpu import build, ops
from nextscale.backends.cpu.experts import RouterPanels
from nextscale.backends.cpu.ops import Linear, full_precision
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.execute import Slices, execute
from nextscale.transformer.feed_forward.records import ExpertSelection, Norms, Sparsity, UnitContribution, joined
from nextscale.transformer.feed_forward.selection import choose, kept_units
from nextscale.transformer.feed_forward.thresholds import Thresholds


class ExpertRouter(nn.Module):
    """Predicts the norm of each expert's output: Linear-GELU-Linear-|.|, in float32 whatever the rest is."""

    may_pack = False

    def __init__(self, width: int, hidden: int, experts: int):
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=False)
        self.fc2 = Linear(hidden, experts, bias=False)
        self._panels: RouterPanels | None = None

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):  # rounded norms would choose other experts
            return _in_float32(self.fc2, _in_float32(self.fc1, x, gelu=True)).abs()

    def choose(self, x_TD: Tensor, tau: float, selection: str) -> Tensor:
        """`select.choose` by the predicted norms, (T, E)."""
        usable = selection == "threshold" and 0 < tau < 1 and build.usable(x_TD, self.fc1.weight)
        kernels = build.load("experts", RouterPanels.vectors) if usable and self.may_pack else None
        if kernels is None:
            return choose(self(x_TD), tau, selection)
        if self._panels is None:
            self._panels = RouterPanels(_whole(self.fc1), _whole(self.fc2))
        return self._panels.chosen(kernels, x_TD.contiguous(), tau)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._panels = None
        return super()._apply(*arguments, **options)


def _in_float32(layer: Linear, x: Tensor, gelu: bool = False) -> Tensor:
    packed_low = layer.weight.is_mkldnn and layer.weight.dtype != torch.float32
    weight = layer.weight.to_dense() if packed_low else layer.weight
    if weight.dtype == x.dtype == torch.float32:
        return layer(x, gelu)
    return ops.linear(x.float(), weight.float(), gelu=gelu)


class Pair(nn.Module):
    """The two projections of an FFN."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)


class DynamicFeedForward(nn.Module):
    """An FFN, D to F to D, that runs a part of its experts where a threshold is below 1."""

    def __init__(self, config: TransformerConfig, scales: int):
        super().__init__()
        D, hidden, self.config = config.width, config.ffn_width, config.dynamic
        self.first = scales - min(self.config.scales, scales)  # the first sparse scale
        self.fc1 = Linear(D, hidden)
        self.fc2 = Linear(hidden, D)
        self.late = Pair(D, hidden) if self.config.own else None
        self.router, self.slices = None, Slices()
        if self.config.experts:
            self.router = ExpertRouter(D, self.config.router_width, self.config.experts)
            self.register_buffer("importance_F", torch.zeros(hidden))

    importance_F: Tensor
    """Mean contribution of each hidden unit at the sparse scales: what static pruning goes by."""

    @property
    def outputs(self) -> list[Linear]:
        """The last projection, which writes to the residual stream."""
        return [self.fc2]

    @property
    def divided(self) -> tuple[Linear, Linear]:
        """The projections that experts are slices of."""
        return (self.late.fc1, self.late.fc2) if self.late is not None else (self.fc1, self.fc2)

    def forward(self, x_BND: Tensor, context: ScaleContext) -> tuple[Tensor, Any]:
        pieces = self.pieces(context, x_BND.shape[1])
        done = [self.piece(x_BND[:, start:end], context.thresholds, tau, late) for start, end, tau, late in pieces]
        records = [record for _, record in done if record is not None]
        y_BND = done[0][0] if len(done) == 1 else torch.cat([y for y, _ in done], dim=1)
        return y_BND, joined(records)

    def pieces(self, context: ScaleContext, count: int) -> list[tuple[int, int, float, bool]]:
        """(start, end, threshold, whether the scale is a sparse one) of tokens that are treated alike, in order."""
        thresholds, found = context.thresholds, list[tuple[int, int, float, bool]]()
        segments = context.segments(count)
        for k, (start, end) in enumerate(segments, start=context.k + 1 - len(segments)):
            late = k >= self.first
            alike = (thresholds.tau_K[k] if thresholds else 1.0), late and self._late_differs(thresholds)
            if found and found[-1][2:] == alike:
                found[-1] = (found[-1][0], end, *alike)
            else:
                found.append((start, end, *alike))
        return found

    def _late_differs(self, thresholds: Thresholds | None) -> bool:
        """Whether sparse scales are another case than the others even with all experts."""
        return self.late is not None or bool(thresholds and thresholds.record == "contribution")

    def piece(self, x_BND: Tensor, thresholds: Thresholds | None, tau: float, late: bool) -> tuple[Tensor, Any]:
        """The output of tokens that are treated alike, as `pieces` says, and its record."""
        own = late and self.late is not None
        fc1, fc2 = self.divided if own else (self.fc1, self.fc2)
        relu = self.config.activation == "relu" and (own or self.late is None)
        if thresholds is not None and tau < 1:
            return self._part(x_BND, tau, thresholds.selection)
        a_BNF = _activated(fc1, x_BND, relu)
        y_BND, record = fc2(a_BNF), None
        if thresholds is not None and thresholds.record:
            if thresholds.record != "contribution" or late:
                record = (
                    self._measure_activations(x_BND, a_BNF, thresholds.record) if own or self.late is None else None
                )
        elif thresholds is not None:
            return y_BND, _select_all(x_BND, a_BNF.shape[-1])
        return y_BND, record

    def _part(self, x_BND: Tensor, tau: float, selection: str) -> tuple[Tensor, ExpertSelection]:
        """The output of the experts that are chosen, or of the hidden units that are kept."""
        (fc1, fc2), relu, experts = self.divided, self.config.activation == "relu", self.config.experts
        x_TD = x_BND.flatten(0, 1)
        if selection == "pruned":
            units = kept_units(self.importance_F, tau)
            y_TD = _pruned(x_TD, units, fc1, fc2, relu)
            return y_TD.view_as(x_BND), _select_all(x_BND, len(units))
        assert self.router is not None, "thresholds are made for models with experts"
        if selection == "oracle":
            chosen_TE = choose(expert_norms(_activated(fc1, x_TD, relu), _whole(fc2), experts), tau)
        else:
            chosen_TE = self.router.choose(x_TD, tau, selection)
        y_TD = execute(x_TD, chosen_TE, (fc1, fc2), relu, self.slices)
        chosen_BNE = chosen_TE.view(*x_BND.shape[:2], experts)
        return y_TD.view_as(x_BND), ExpertSelection(
            chosen_BNE, fc1.out_features // experts, routed=selection != "oracle"
        )

    def _measure_activations(self, x_BND: Tensor, a_BNF: Tensor, what: str) -> Sparsity | Norms | UnitContribution:
        if what == "sparsity":
            a_BNF = a_BNF.float()
            hoyer_BN = a_BNF.abs().sum(dim=-1).square() / (a_BNF.square().sum(dim=-1) + 1e-15)
            return Sparsity(hoyer_BN.mean(), (a_BNF == 0).float().mean())
        fc2 = _whole(self.divided[1])
        if what == "contribution":
            return UnitContribution(a_BNF.abs().double().sum(dim=(0, 1)) * fc2.float().norm(dim=0).double())
        assert self.router is not None, "norms are recorded of models with experts"
        with torch.no_grad(), full_precision(x_BND):
            true_TE = expert_norms(a_BNF.flatten(0, 1), fc2, self.config.experts)
        return Norms(self.router(x_BND.detach()), true_TE.view(*x_BND.shape[:2], self.config.experts))


def _select_all(x_BND: Tensor, units: int) -> ExpertSelection:
    """`units` hidden units for every token, selected by no router."""
    return ExpertSelection(
        torch.ones(1, 1, 1, dtype=torch.bool, device=x_BND.device).expand(*x_BND.shape[:2], 1), units, False
    )


def _activated(fc1: Linear, x: Tensor, relu: bool) -> Tensor:
    return F.relu(fc1(x), inplace=not torch.is_grad_enabled()) if relu else fc1(x, gelu=True)


def _whole(layer: Linear) -> Tensor:
    return layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight


def _pruned(x_TD: Tensor, units: Tensor, fc1: Linear, fc2: Linear, relu: bool) -> Tensor:
    a_Tn = ops.linear(x_TD, _whole(fc1)[units], fc1.bias[units], gelu=not relu)
    return ops.linear(a_Tn.relu() if relu else a_Tn, _whole(fc2)[:, units].contiguous(), fc2.bias)


def expert_norms(a_TF: Tensor, w2_DF: Tensor, experts: int, at_once: int = 4096) -> Tensor:
    """Norm of each expert's output |W2_e a_e|_2, (T, E) float32, without that output.

    |W2_e a_e|^2 = a_e^T (W2_e^T W2_e) a_e: with the S x S matrix in the middle S^2 multiply-adds in place of S D, and
    no array of E x T x D. `at_once` rows at a time.
    """
    w2_EDS = w2_DF.float().unflatten(1, (experts, -1)).permute(1, 0, 2)
    gram_ESS = w2_EDS.mT @ w2_EDS
    norms = []
    for rows_tF in a_TF.float().split(at_once):
        a_EtS = rows_tF.unflatten(1, (experts, -1)).transpose(0, 1)
        norms.append(((a_EtS @ gram_ESS) * a_EtS).sum(dim=-1).clamp_min(0).sqrt().T)
    return torch.cat(norms)
