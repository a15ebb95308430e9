"""Steps of training that leave out the last scales of their images (`SizesConfig.drop`), and losses up to a scale.

Letters: B batch, L tokens of all scales, K scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.transformer_training import SizesConfig
from nextscale.pyramid import Pyramid

LENGTH = "length"
"""The random number of a step that decides how many scales it keeps: one for all its examples."""


def check_lengths(config: SizesConfig, guided: Mapping[Pyramid, tuple[int, ...]]) -> None:
    """UserError where no scale can be left out of any pyramid, or one that semantic guidance needs, `guided`."""
    if not any(config.list_lengths(len(pyramid)) for pyramid in guided):
        scales = " and ".join(map(str, guided))
        raise UserError(f"sizes.drop: no scale can be left out of {scales} with sizes.lengths {list(config.lengths)}")
    for pyramid, scales_of_guidance in guided.items():
        needed = max(scales_of_guidance, default=-1) + 1
        if min(config.list_lengths(len(pyramid)), default=needed) < needed:
            raise UserError(
                f"sizes.drop: guidance needs the first {needed} scales of {pyramid}: give --sizes.lengths of {needed} "
                "or more, or another --loss.group"
            )


def choose_length(config: SizesConfig, scales: int, draw: float) -> int:
    """How many of so many scales a step keeps, from a random number in [0, 1); all where none can be left out."""
    lengths = config.list_lengths(scales)
    if draw >= config.drop or not lengths:
        return scales
    return lengths[int(draw / config.drop * len(lengths))]


def average_scales(values_BL: Tensor, pyramid: Pyramid) -> Tensor:
    """The mean of each scale, (K,)."""
    return torch.stack([values_BL[:, start:end].mean() for start, end in pyramid.spans])


def average_lengths(
    nats_BL: Tensor, pyramid: Pyramid, config: SizesConfig, scales: int, *, trained: bool
) -> dict[str, Tensor]:
    """The cross-entropy of images up to a scale, such as cross_entropy_to_4x4: of a step that keeps `scales`, that one;
    in validation, of all lengths that steps keep."""
    lengths = (scales,) if trained else config.list_lengths(len(pyramid))
    means = {}
    for length in lengths:
        (h, w), (_, end) = pyramid.sides[length - 1], pyramid.spans[length - 1]
        means[f"cross_entropy_to_{h}x{w}"] = nats_BL[:, :end].mean()
    return means
