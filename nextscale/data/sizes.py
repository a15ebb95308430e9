"""Examples at several sizes: each batch holds examples of one size, the same on all processes.

An image belongs to the sizes of the shape (height over width) nearest to its own; where all sizes have one shape, to
all of them. An epoch shows each example once at each of its sizes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.config.model import ModelConfig
from nextscale.data.cache import is_token_cache, open_examples
from nextscale.data.captions import TextInput
from nextscale.data.examples import Batch, Examples
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer

Opened = tuple[Examples, Examples, tuple[str, ...]]
"""Training and held-out examples, and the names of the classes."""


class SizedExamples:
    """Examples of several sizes. Batch b of an epoch has one of them: the examples of each are shuffled and cut into
    batches, the last of which is filled with its first ones, and the batches of all sizes are shuffled.

    A batch says its size under `size`, int64 (B,): its number among `parts`. `batch`: examples of a step.
    """

    def __init__(self, parts: Sequence[Examples], names: Sequence[str], own: int = 0, batch: int = 1):
        """`names`: of the sizes. `own`: the number of the model's own one."""
        self.parts, self.names, self.own, self.batch = parts, names, own, batch
        self.starts = [0, *accumulate(len(part) for part in parts[:-1])]
        self.skipped: Sequence[str] = list(dict.fromkeys(name for part in parts for name in part.skipped))
        inputs = [part.inputs for part in parts]
        same = all(other == inputs[0] for other in inputs)
        self.inputs: dict[str, Any] = inputs[0] if same else dict(zip(names, inputs, strict=True))

    @property
    def decodes(self) -> bool:
        """Whether fetching decodes images."""
        return any(part.decodes for part in self.parts)

    def __len__(self) -> int:
        """Examples of an epoch: each size has a whole number of batches."""
        return sum(-(-len(part) // self.batch) * self.batch for part in self.parts)

    def order(self, rng: torch.Generator) -> Tensor:
        batches = []
        for start, part in zip(self.starts, self.parts, strict=True):
            own, count = part.order(rng) + start, -(-len(part) // self.batch) * self.batch
            batches.append(own.repeat(-(-count // len(own)))[:count].view(-1, self.batch))
        rows = torch.cat(batches)
        return rows[torch.randperm(len(rows), generator=rng)].flatten()

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        """A batch of the size of the first index: `order` puts indices of one size together."""
        number = bisect_right(self.starts, int(indices[0])) - 1
        part, start = self.parts[number], self.starts[number]
        own = [(int(i) - start) % len(part) for i in indices]
        if positions is not None:  # one for each example of each epoch, from which its crop and its flip are drawn
            positions = [p // len(self) * len(part) + i for p, i in zip(positions, own, strict=True)]
        return part.fetch(own, positions) | {"size": torch.full((len(own),), number)}


class OneSize:
    """The examples of one size, as `SizedExamples` fetches them."""

    skipped: Sequence[str] = ()

    def __init__(self, examples: SizedExamples, number: int):
        self.examples, self.start, self.part = examples, examples.starts[number], examples.parts[number]
        self.inputs, self.decodes = self.part.inputs, self.part.decodes

    def __len__(self) -> int:
        return len(self.part)

    def order(self, rng: torch.Generator) -> Tensor:
        return self.part.order(rng)

    def fetch(self, indices: Sequence[int], positions: Sequence[int] | None) -> Batch:
        return self.examples.fetch([self.start + int(i) for i in indices], positions)


def join_sizes(
    parts: Sequence[Examples], held_parts: Sequence[Examples], pyramids: Sequence[Pyramid], own: Pyramid, batch: int
) -> tuple[Examples, Examples]:
    """Training and held-out examples of all sizes together; of one size, as they are."""
    if len(pyramids) == 1:
        return parts[0], held_parts[0]
    names, number = name_pyramids(pyramids), list(pyramids).index(own)
    return SizedExamples(parts, names, number, batch), SizedExamples(held_parts, names, number)


def name_pyramids(pyramids: Sequence[Pyramid]) -> list[str]:
    """The last sides, such as 8x8; with the number of scales, 8x8-6, where two are equal; else with all of them."""
    sides = ["{}x{}".format(*pyramid.last) for pyramid in pyramids]
    longer = [f"{side}-{len(pyramid)}" for side, pyramid in zip(sides, pyramids, strict=True)]
    names = [b if sides.count(a) > 1 else a for a, b in zip(sides, longer, strict=True)]
    return names if len({*names}) == len(names) else [str(pyramid).replace(",", "_") for pyramid in pyramids]


def keep_nearest(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor] | None:
    """Which images belong to `size`, a (height, width): a function of their widths and heights (B, 2) that returns
    bool (B,). None where all sizes have one shape, and so all images."""
    ratios = sorted({height / width for height, width in sizes})
    if len(ratios) == 1:
        return None
    logs, own = torch.tensor(ratios, dtype=torch.float64).log(), ratios.index(size[0] / size[1])

    def keep(shapes_B2: Tensor) -> Tensor:
        width_B, height_B = shapes_B2.double().unbind(1)
        return ((height_B / width_B).log()[:, None] - logs).abs().argmin(dim=1) == own

    return keep


def find_size_folder(cache: Path, pyramid: Pyramid) -> Path:
    """Where a token cache has the tokens of another pyramid than its own: a token cache in it."""
    return cache / "sizes" / str(pyramid).replace(",", "_")


def open_sizes(
    data: str, model: ModelConfig, pyramids: Sequence[Pyramid], tokenizer: Tokenizer, config: DataConfig, seed: int,
    text: TextInput | None = None,
) -> list[Opened]:  # fmt: skip
    """What `open_examples` gives for each pyramid, of the images that belong to it. UserError names the size of which a
    token cache has no tokens, or to which no image belongs."""
    models = [replace(model, pyramid=pyramid, sizes=()) for pyramid in pyramids]
    sizes, opened = [sized.image_size for sized in models], list[Opened]()
    for sized in models:
        source, pyramid = data, sized.pyramid
        if is_token_cache(Path(data)) and pyramid != model.pyramid:
            source = str(find_size_folder(Path(data), pyramid))
            if not is_token_cache(Path(source)):
                raise UserError(f"{data} has no tokens at scales {pyramid}: `nextscale tokenize --sizes` adds them")
        keep = keep_nearest(sized.image_size, sizes)
        opened.append(open_examples(source, sized, tokenizer.at(pyramid), config, seed, text, keep))
    return opened
