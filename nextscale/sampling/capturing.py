"""When the steps of a pipeline run as captured graphs (`nextscale.backends.cuda.graphs`)."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import torch

from nextscale.backends.cuda.graphs import GraphPool
from nextscale.common.errors import UserError
from nextscale.config.sampling import Capture, SampleConfig
from nextscale.sampling import CreatePredictor
from nextscale.sampling.combinations import Request, find_refusal
from nextscale.sampling.guidance import count_sequences, schedule_parts
from nextscale.transformer.var import VAR

MOST_SEQUENCES = 32
"""Up to so many sequences (two an image with guidance) graphs are used by themselves: above, the products of VAR-d16
take a GPU longer than launching their kernels, by the estimate of docs/performance.md."""


class Capturing:
    """The captured steps of one pipeline, and the choice between them and plain steps.

    `auto`: captured on a GPU for up to MOST_SEQUENCES sequences, from the second batch of a size on, because capturing
    takes as long as some batches; plain for settings that cannot be captured and where records are asked for, which
    captured steps do not have. `on`: captured always, and settings that cannot be are refused.
    """

    def __init__(self) -> None:
        self.pool = GraphPool()
        self._seen: Counter[tuple[int, ...]] = Counter()

    def choose(
        self, mode: Capture, model: VAR, settings: SampleConfig, refiner: VAR | None, images: int
    ) -> CreatePredictor | None:
        """How to create the predictor of this batch; None: plain steps."""
        if mode == "on":
            return self.pool.create_predictor
        refining, fixed = refiner.config if refiner is not None else None, skips_experts(model.pos_start.device)
        request = Request(settings, model.config, refining, captured=True, fixed_experts=fixed)
        sequences_K = tuple(images * count for count in count_sequences(*schedule_parts(settings, model.pyramid)))
        if max(sequences_K) > MOST_SEQUENCES or find_refusal(request):
            return None
        self._seen[sequences_K] += 1
        return self.pool.create_predictor if self._seen[sequences_K] > 1 else None


def skips_experts(device: torch.device) -> bool:
    """Whether dynamic experts below tau 1 run in fixed shapes on this device: by kernels."""
    from nextscale.backends.cuda.tiles import TorchProducts, load_products

    return not isinstance(load_products(device), TorchProducts)


def check_capture(mode: str, device: torch.device) -> None:
    """UserError for a mode that there is not, and when graphs are asked for where there are none."""
    if mode not in get_args(Capture):
        raise UserError(f"there is no capture '{mode}'; use {', '.join(get_args(Capture))}")
    if mode == "on" and device.type != "cuda":
        raise UserError(f"capture on needs a CUDA device, and this is {device}: use auto or off")
