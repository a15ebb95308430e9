"""The experts of a mixture, each an FFN whose hidden units are divided: experts within experts.

The mixture's router sends a token to some of its M experts, as ever. At sparse scales a dial below 1 then runs, of each
of these, the part that matters to this token: every pair of token and expert is routed by itself, by the norms that the
expert's own router predicts.

Letters: B sequences, N tokens at hand, T rows, D width, M experts of the mixture, R pairs of row and expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.config.model import TransformerConfig
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward
from nextscale.transformer.feed_forward.experts import Dispatch, looped
from nextscale.transformer.feed_forward.records import Activity, Norms, Sparsity, Use, counted, joined
from nextscale.transformer.feed_forward.thresholds import Dial


class DynamicExperts(nn.ModuleList):
    """M dynamic FFNs where a mixture has `nextscale.transformer.feed_forward.experts.Experts` otherwise."""

    def __init__(self, config: TransformerConfig, scales: int):
        super().__init__(DynamicFeedForward(config, scales) for _ in range(config.experts.count))

    @property
    def ffns(self) -> list[DynamicFeedForward]:
        """The experts in order."""
        return [cast(DynamicFeedForward, ffn) for ffn in self]

    def forward(
        self, x_BND: Tensor, gates_BNM: Tensor, chosen_BNM: Tensor, at_most: int, context: ScaleContext
    ) -> tuple[Tensor, Any]:
        """sum_j gates[i, j] E_j(x_i) over the experts j that token i has chosen, (B, N, D), and what they recorded.

        `chosen_BNM` is a mask with `at_most` pairs.
        """
        outs, records = [], []
        for start, end, tau, late in self.ffns[0].pieces(context, x_BND.shape[1]):
            parts = [t[:, start:end] for t in (x_BND, gates_BNM, chosen_BNM)]
            y_BND, record = self._piece(parts, at_most, context.dial, tau, late)
            outs.append(y_BND)
            records += [record] if record is not None else []
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), joined(records)

    def _piece(
        self, parts: list[Tensor], at_most: int, dial: Dial | None, tau: float, late: bool
    ) -> tuple[Tensor, Any]:
        """Input, gates and choices of tokens that are treated alike, one expert after the other."""
        x_TD, gates_TM, chosen_TM = (part.flatten(0, 1) for part in parts)
        dispatch, found = Dispatch.of(chosen_TM, at_most), dict[int, Any]()

        def work(j: int, rows_rD: Tensor) -> Tensor:
            y_1rD, found[j] = self.ffns[j].piece(rows_rD.unsqueeze(0), dial, tau, late)
            return y_1rD.squeeze(0)

        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        looped(x_TD, dispatch, work, gates_TM[dispatch.row_R, dispatch.expert_R], into=y_TD)
        if torch.is_grad_enabled():  # processes must agree on who has a gradient: without rows it is 0
            idle = [work(j, x_TD[:0]).to(y_TD.dtype) for j in range(len(self)) if j not in found]
            y_TD = torch.cat([y_TD, *idle]) if idle else y_TD
        record = self._together(found, dispatch, parts[0].shape[:2], dial, late) if dial is not None else None
        return y_TD.to(x_TD.dtype).view_as(parts[0]), record

    def _together(
        self, found: dict[int, Any], dispatch: Dispatch, shape: torch.Size, dial: Dial, late: bool
    ) -> Activity | Sparsity | Norms | Use | None:
        """What those experts that had rows recorded, as one record of `shape` (B, N) tokens."""
        if dial.observe == "use":
            return Use(torch.cat([_use(ffn, found.get(j)) for j, ffn in enumerate(self.ffns)])) if late else None
        if dial.observe == "norms":
            return joined([found[j] for j in sorted(found) if found[j] is not None])
        pieces = [(dispatch.row_R[i:end], counted(found[j])) for j, i, end in dispatch.pieces() if found[j] is not None]
        if not dial.observe:
            counts = [torch.zeros(shape.numel(), dtype=torch.int64, device=dispatch.row_R.device) for _ in range(3)]
            for row_r, ran in pieces:
                for count_T, part_1r in zip(counts, (ran.units_BN, ran.ffns_BN, ran.routed_BN), strict=True):
                    count_T.index_add_(0, row_r, part_1r[0])
            return Activity(*(count_T.view(shape) for count_T in counts))
        if not pieces:
            return None
        share = [len(row_r) / sum(len(rows) for rows, _ in pieces) for row_r, _ in pieces]
        hoyer, zeros = (torch.stack([getattr(r, name) for _, r in pieces]) for name in ("hoyer", "zeros"))
        weight = hoyer.new_tensor(share)  # experts count by their rows
        return Sparsity((hoyer * weight).sum(), (zeros * weight).sum())


def _use(ffn: DynamicFeedForward, record: Use | None) -> Tensor:
    return torch.zeros_like(ffn.importance_F, dtype=torch.float64) if record is None else record.contribution_F
