"""Semantic guidance (MEPA, Sec. 4.3): aligns a middle block's features of the coarse scales with an encoder's.

Letters: B images, N tokens of the first scales, D width, E width of the encoder's features, g x h its grid.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.precision import disable_autocast
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid

GROUPS = ("last", "large", "intermediate", "small")


class Projector(nn.Module):
    """m_phi: Linear-SiLU-Linear-SiLU-Linear from the transformer's width to the encoder's."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        head = config.alignment
        self.fc1 = nn.Linear(config.width, head.hidden)
        self.fc2 = nn.Linear(head.hidden, head.hidden)
        self.fc3 = nn.Linear(head.hidden, head.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc3(F.silu(self.fc2(F.silu(self.fc1(x_BND)))))


def parse_scale_group(group: str, count: int) -> tuple[int, ...]:
    """The scales of a group, from 0, in a pyramid of `count`.

    `group`: a name of Table 6, or numbers counted from 1 as the paper does: 5,6,7. Of ten scales `last` is 10, `large`
    8 to 10, `intermediate` 5 to 7, `small` 1 to 3; in other pyramids what stands at the same place, at least one scale.
    UserError for anything else.
    """
    bounds = {"last": (count - 1, count), "large": (7, 10), "intermediate": (4, 7), "small": (0, 3)}
    if group == "last":
        return (count - 1,)
    if group in bounds:
        low, high = bounds[group]
        found = tuple(k - 1 for k in range(1, count + 1) if low * count < 10 * k <= high * count)
        return found or (min(low * count // 10, count - 1),)
    numbers = group.replace(" ", "").split(",")
    if not all(n.isdecimal() and 1 <= int(n) <= count for n in numbers):
        raise UserError(
            f"loss.group is '{group}'; give one of {', '.join(GROUPS)}, or scales from 1 to {count}, as 3,4"
        )
    return tuple(sorted({int(n) - 1 for n in numbers}))


def enlarge_scales(projected_BNE: Tensor, pyramid: Pyramid, grid: tuple[int, int]) -> list[Tensor]:
    """Up of Eq. 11 for every scale at hand, (B, E, g, h) each: projected maps enlarged to the grid."""
    maps: list[Tensor] = []
    for side, (start, end) in zip(pyramid.sides, pyramid.spans, strict=True):
        if end > projected_BNE.shape[1]:
            break
        map_BEhw = projected_BNE[:, start:end].transpose(1, 2).unflatten(2, side)
        maps.append(map_BEhw if side == grid else F.interpolate(map_BEhw, grid, mode="bicubic"))
    return maps


def compute_alignment_loss(
    projected_BNE: Tensor, features_BghE: Tensor, pyramid: Pyramid, scales: tuple[int, ...], aggregate: bool = True
) -> Tensor:
    """L_SG of Eq. 12, float32: minus the cosine of each patch's feature and z_j, averaged over patches and images,
    summed over the scales j in `scales`; so from -len(scales) to len(scales).

    `aggregate`: z_j is the sum of the enlarged maps of all scales up to j (Eq. 11). Otherwise it is that of j alone.
    """
    _, g, h, _ = features_BghE.shape
    with disable_autocast(projected_BNE):
        target_BEgh = features_BghE.float().permute(0, 3, 1, 2)
        z = enlarge_scales(projected_BNE.float(), pyramid, (g, h))
        z = list(itertools.accumulate(z)) if aggregate else z
        return -sum((F.cosine_similarity(target_BEgh, z[j], dim=1).mean() for j in scales), torch.zeros(()))
