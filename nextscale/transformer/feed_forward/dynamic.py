"""The feed-forward layer whose hidden units are divided into experts (DMoE-VAR, arXiv 2510.08629).

The division is a permutation of the dense layer's hidden units: expert e has rows e S to (e + 1) S of fc1 and the same
columns of fc2. So the dense layer is one product each way, and the bias of fc2 is added once:

    y = b2 + sum over the experts e that run of W2_e act(W1_e x + b1_e)

Letters: B sequences, N tokens at hand, T rows, D width, F hidden units, E experts, S hidden units of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.precision import Float32Linear, compute_exactly, widen
from nextscale.config.transformer import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import FeedForward, Record
from nextscale.transformer.feed_forward.records import ExpertSelection, Norms, Sparsity, UnitContribution
from nextscale.transformer.feed_forward.selection import (
    PRUNED,
    select_experts,
    select_random_experts,
    select_units,
)
from nextscale.transformer.feed_forward.thresholds import UNROUTED, Thresholds

Layers = tuple[nn.Linear, nn.Linear]
"""fc1 and fc2."""


class ExpertRouter(nn.Module):
    """Predicts the norm of each expert's output: Linear-GELU-Linear-|.|, in float32 whatever the rest is."""

    def __init__(self, width: int, hidden: int, experts: int):
        super().__init__()
        self.fc1 = Float32Linear(width, hidden, bias=False)
        self.fc2 = Float32Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norms (..., E) for x (..., D), float32."""
        with compute_exactly(x):  # rounded norms would select other experts
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh")).abs()

    def select(self, x_TD: Tensor, tau: float, selection: str) -> Tensor:
        """`select_experts` by the predicted norms, (T, E)."""
        return select_experts(self(x_TD), tau, selection)


class Projections(nn.Module):
    """The two projections of an FFN."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class DynamicFeedForward(FeedForward):
    """An FFN, D to F to D, of which each token uses a part at scales whose threshold is below 1."""

    importance_F: Tensor
    """Mean contribution of each hidden unit at the sparse scales, for static pruning."""
    activation_F: Tensor
    """Its mean activation, for static pruning as in DMoE-VAR."""

    def __init__(self, config: TransformerConfig, scales: int, block: int = 0):
        super().__init__(config, scales, block)
        D, hidden, self.config, self.block = config.width, config.ffn_width, config.dynamic, block
        self.first_sparse = scales - min(self.config.scales, scales)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)
        self.late = Projections(D, hidden) if self.config.late_ffn else None
        self.router = None
        if self.config.experts:
            self.router = ExpertRouter(D, self.config.router_width, self.config.experts)
            for name in ("importance_F", "activation_F"):
                self.register_buffer(name, torch.zeros(hidden))

    @property
    def output_layers(self) -> list[Any]:
        return [self.fc2]

    @property
    def divided(self) -> Layers:
        """The projections that are divided into experts."""
        return (self.late.fc1, self.late.fc2) if self.late is not None else (self.fc1, self.fc2)

    def forward(self, x_BND: Tensor, context: ScaleContext, previous: Any = None) -> tuple[Tensor, Record | None]:
        outputs, records = [], []
        for start, end, tau, is_late in self.group_tokens(context, x_BND.shape[1]):
            first = context.span[0] + start
            y_BND, record = self.run_group(x_BND[:, start:end], context.thresholds, tau, is_late, first)
            outputs.append(y_BND)
            records += [record] if record is not None else []
        y_BND = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return y_BND, join_records(records)

    def group_tokens(self, context: ScaleContext, count: int) -> list[tuple[int, int, float, bool]]:
        """(start, end, tau, whether they use the FFN of the sparse scales) of neighbouring tokens that are computed
        alike."""
        thresholds, groups = context.thresholds, list[tuple[int, int, float, bool]]()
        spans = context.list_spans(count)
        for k, (start, end) in enumerate(spans, start=context.k + 1 - len(spans)):
            is_late = k >= self.first_sparse and self._separates_late(thresholds)
            kind = (thresholds.tau_K[k] if thresholds else 1.0), is_late
            if groups and groups[-1][2:] == kind:
                groups[-1] = (groups[-1][0], end, *kind)
            else:
                groups.append((start, end, *kind))
        return groups

    def _separates_late(self, thresholds: Thresholds | None) -> bool:
        """Whether sparse scales are computed or recorded differently from the others even with all experts."""
        return self.late is not None or bool(thresholds and thresholds.record == "contribution")

    def run_group(
        self, x_BND: Tensor, thresholds: Thresholds | None, tau: float, is_late: bool, first: int
    ) -> tuple[Tensor, Record | None]:
        """The output of a group of tokens, see `group_tokens`, and its record. `first`: position of the first token."""
        uses_late = is_late and self.late is not None
        fc1, fc2 = self.divided if uses_late else (self.fc1, self.fc2)
        relu = self.config.activation == "relu" and (uses_late or self.late is None)
        if thresholds is not None and tau < 1:
            return self._run_part(x_BND, tau, thresholds, first)
        a_BNF = self.activate(fc1, x_BND, relu)
        y_BND, record = fc2(a_BNF), None
        if thresholds is None:
            return y_BND, None
        if not thresholds.record:
            return y_BND, select_all_units(x_BND, a_BNF.shape[-1])
        if (thresholds.record != "contribution" or is_late) and (uses_late or self.late is None):
            record = self._record(x_BND, a_BNF, thresholds.record)
        return y_BND, record

    def _run_part(self, x_BND: Tensor, tau: float, thresholds: Thresholds, first: int) -> tuple[Tensor, Record]:
        """The output of the selected experts, or of the hidden units that static pruning leaves."""
        (fc1, _), relu, experts = self.divided, self.config.activation == "relu", self.config.experts
        x_TD, selection = x_BND.flatten(0, 1), thresholds.selection
        if selection in PRUNED:
            units = select_units(self.importance_F if selection == "pruned" else self.activation_F, tau)
            return self.run_units(x_TD, units, relu).view_as(x_BND), select_all_units(x_BND, len(units))
        assert self.router is not None, "thresholds are made for models with experts"
        if selection == "oracle":
            norms_TE = compute_expert_norms(self.activate(fc1, x_TD, relu), self.get_weight(self.divided[1]), experts)
            selected_TE = select_experts(norms_TE, tau)
        elif selection == "random":
            positions = range(first, first + x_BND.shape[1])
            selected_NE = select_random_experts(thresholds.seed, self.block, positions, experts, tau, x_BND.device)
            selected_TE = selected_NE.repeat(len(x_BND), 1)
        else:
            selected_TE = self.router.select(x_TD, tau, selection)
        y_TD = self.run_experts(x_TD, selected_TE, relu)
        selected_BNE = selected_TE.view(*x_BND.shape[:2], experts)
        size = fc1.out_features // experts
        record = Record(selections=(ExpertSelection(selected_BNE, size, routed=selection not in UNROUTED),))
        return y_TD.view_as(x_BND), record

    def run_experts(self, x_TD: Tensor, selected_TE: Tensor, relu: bool) -> Tensor:
        """b2 + sum over the selected experts e of W2_e act(W1_e x + b1_e), (T, D).

        Computes all experts and clears the hidden units of those that are not selected.
        """
        fc1, fc2 = self.divided
        a_TF = self.activate(fc1, x_TD, relu)
        return fc2(a_TF * selected_TE.to(a_TF.dtype).repeat_interleave(a_TF.shape[1] // selected_TE.shape[1], dim=1))

    def run_units(self, x_TD: Tensor, units: Tensor, relu: bool) -> Tensor:
        """The output (T, D) of these hidden units alone."""
        fc1, fc2 = self.divided
        h_Tn = F.linear(x_TD, self.get_weight(fc1)[units], fc1.bias[units])
        a_Tn = h_Tn.relu() if relu else F.gelu(h_Tn, approximate="tanh")
        return F.linear(a_Tn, self.get_weight(fc2)[:, units], fc2.bias)

    def activate(self, fc1: nn.Linear, x: Tensor, relu: bool) -> Tensor:
        """The hidden units (..., F)."""
        if relu:
            return F.relu(fc1(x), inplace=not torch.is_grad_enabled())
        return F.gelu(fc1(x), approximate="tanh")

    def get_weight(self, layer: nn.Linear) -> Tensor:
        """A projection's weight."""
        return layer.weight

    def _record(self, x_BND: Tensor, a_BNF: Tensor, what: str) -> Record:
        if what == "sparsity":
            a_BNF = a_BNF.float()
            hoyer_BN = a_BNF.abs().sum(dim=-1).square() / (a_BNF.square().sum(dim=-1) + 1e-15)
            return Record(sparsity=Sparsity(hoyer_BN.mean(), (a_BNF == 0).float().mean()))
        w2_DF = self.get_weight(self.divided[1])
        if what == "contribution":
            contribution_F = widen(a_BNF.abs()).sum(dim=(0, 1)) * widen(w2_DF.float().norm(dim=0))
            return Record(contribution=UnitContribution(contribution_F, widen(a_BNF).sum(dim=(0, 1))))
        assert self.router is not None, "norms are recorded of models with experts"
        with torch.no_grad():
            true_TE = compute_expert_norms(a_BNF.flatten(0, 1), w2_DF, self.config.experts)
        norms = Norms(self.router(x_BND.detach()), true_TE.view(*x_BND.shape[:2], self.config.experts))
        return Record(norms=norms)

    @classmethod
    def count_multiply_adds(cls, config: TransformerConfig, scales: int, tokens: int, block: int) -> int:
        """With all experts, as with tau 1; what a pass executed is counted from its records (`evaluation.flops`)."""
        return tokens * 2 * config.width * config.ffn_width

    @classmethod
    def count_inactive_parameters(cls, config: TransformerConfig) -> int:
        """Of two FFNs, for early and for late scales, one; experts and their router count as active."""
        ffn = 2 * config.width * config.ffn_width + config.ffn_width + config.width
        return ffn * config.dynamic.late_ffn


def join_records(records: list[Record]) -> Record | None:
    """The record of the whole pass from those of its groups of tokens; None if there are none."""
    if len(records) < 2:
        return records[0] if records else None
    norms = [r.norms for r in records if r.norms is not None]
    if norms:
        predicted, true = ([getattr(n, name) for n in norms] for name in ("predicted_BNE", "true_BNE"))
        return Record(norms=Norms(torch.cat(predicted, dim=1), torch.cat(true, dim=1)))
    assert all(r.selections for r in records), "sparsity and contributions are recorded of one group"
    return replace(records[0], selections=tuple(s for r in records for s in r.selections))


def select_all_units(x_BND: Tensor, units: int) -> Record:
    """So many hidden units for every token, selected without a router."""
    selected_BN1 = torch.ones(1, 1, 1, dtype=torch.bool, device=x_BND.device).expand(*x_BND.shape[:2], 1)
    return Record(selections=(ExpertSelection(selected_BN1, units, routed=False),))


def compute_expert_norms(a_TF: Tensor, w2_DF: Tensor, experts: int, chunk: int = 4096) -> Tensor:
    """Norm of each expert's output |W2_e a_e|_2, (T, E) float32, without that output.

    |W2_e a_e|^2 = a_e^T (W2_e^T W2_e) a_e: with the S x S matrix in the middle S^2 multiply-adds in place of S D, and
    no array of E x T x D. `chunk` rows at a time.
    """
    w2_EDS, norms = w2_DF.float().unflatten(1, (experts, -1)).permute(1, 0, 2), []
    with compute_exactly(a_TF):  # experts are selected by them
        gram_ESS = w2_EDS.mT @ w2_EDS
        for rows_tF in a_TF.float().split(chunk):
            a_EtS = rows_tF.unflatten(1, (experts, -1)).transpose(0, 1)
            norms.append(((a_EtS @ gram_ESS) * a_EtS).sum(dim=-1).clamp_min(0).sqrt().T)
    return torch.cat(norms)
