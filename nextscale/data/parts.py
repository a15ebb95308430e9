"""Parts of a set: which images stand for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from nextscale.common.rng import make_generator


def choose_part(total: int, count: int, labels_N: Tensor | None = None, seed: int = 0) -> Tensor:
    """`count` of `total` row numbers, ascending, drawn with a seed; all of them when `count` is at least `total`.

    With labels every class has its share, by Webster's method: to within 1/2 + C/2 times the share of the class in the
    set, of C classes, and hardly ever by more than one image. So the part does not depend on how a set is sorted: of
    the same images in another order it is another part, as good as this one.
    """
    if count >= total:
        return torch.arange(total)
    order = torch.randperm(total, generator=make_generator(seed, "part"))
    if labels_N is not None:
        # Row j of the n rows of a class is at place (j + 1/2) / n of the set. The first places are a stratified part.
        labels = labels_N[order]
        members, sizes = torch.argsort(labels, stable=True), torch.bincount(labels)
        starts = sizes.cumsum(0) - sizes
        sorted_labels = labels[members]
        place = (torch.arange(total) - starts[sorted_labels] + 0.5).double() / sizes[sorted_labels]
        shuffled = torch.randperm(total, generator=make_generator(seed, "ties"))
        members, place = members[shuffled], place[shuffled]
        order = order[members[torch.argsort(place, stable=True)]]
    return order[:count].sort().values
