"""How evenly experts are used: the load-balance loss and the load (MEPA, Eq. 10 and Table 1).

Letters: B images, N tokens, M experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.common.distributed import World
from nextscale.transformer.feed_forward.routers import Routing


def compute_shares(routing: Routing) -> Tensor:
    """f_j of Eq. 10 for each image, the share of its tokens that chose expert j, float32 (B, M). Tokens that a full
    expert dropped did choose it."""
    chosen_BNM = routing.selected_BNM if routing.requested_BNM is None else routing.requested_BNM
    return chosen_BNM.float().mean(dim=1)


def average_shares(routings: Sequence[Routing], world: World) -> list[Tensor]:
    """f_j of Eq. 10 over the images of all processes, (M,) for each routing. All processes must call it, each with as
    many images."""
    share_LM = torch.stack([compute_shares(routing).mean(dim=0) for routing in routings])
    return list(world.sum(share_LM) / world.size)


def compute_balance_loss(
    routing: Routing, zero_computation: int = 0, zero_weight: float = 0.75, share_M: Tensor | None = None
) -> Tensor:
    """L_b of Eq. 10, M sum_j f_j P_j, a scalar: f_j the share of an image's tokens that chose j, P_j j's mean score.

    The mean over images, each by itself: an image's loss then depends on no other. `share_M` are the f_j of all images,
    from `average_shares`, in place of each image's own: then the loss is that of all their tokens together. With even
    use it is m, the number of experts for each token. The last `zero_computation` experts count `zero_weight` (MoE++,
    arXiv 2410.07348, Eq. 7).
    """
    share_BM = compute_shares(routing) if share_M is None else share_M
    score_BM = routing.scores_BNM.mean(dim=1)
    M = score_BM.shape[1]
    weight_M = torch.ones(M, device=score_BM.device)
    weight_M[M - zero_computation :] = zero_weight
    return M * (share_BM * score_BM * weight_M).sum(dim=1).mean()


def compute_expert_load(selected_BNM: Tensor, total: float = 64.0) -> Tensor:
    """How often each expert was chosen, (M,) float32, normalised to a sum of `total` (64 in Table 1)."""
    return normalise_load(selected_BNM.flatten(0, -2).float().sum(dim=0), total)


def normalise_load(count_M: Tensor, total: float = 64.0) -> Tensor:
    """Counts of choices (..., M), normalised to a sum of `total`; zeros where nothing was chosen."""
    return total * count_M / count_M.sum(dim=-1, keepdim=True).clamp_min(1)
