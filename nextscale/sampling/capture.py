"""A transformer's steps on fixed memory, captured as CUDA graphs: at small batches a GPU waits for launches otherwise.

One graph for each scale, replayed for every batch of the same size. On a CPU the same steps run without graphs, on the
same fixed memory, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.transformer.feed_forward.thresholds import resolve_thresholds
from nextscale.transformer.var import VAR, Conditioning

_WARM_UP = 2


class _Fixed:
    """The steps of one model for a fixed number of sequences: inputs, conditioning, caches and logits stay in place."""

    def __init__(self, model: VAR, values: Any):
        self.model, self.conditioning = model, model.conditioning(values)
        self.cache = model.new_cache(len(values))
        self.inputs_BNC: list[Tensor | None] = [None]
        width, device = model.word_embed.in_features, self.conditioning.cond_BD.device
        for count in model.pyramid.counts[1:]:
            self.inputs_BNC.append(torch.zeros(len(values), count, width, device=device))
        self.graphs: list[tuple[Any, Tensor]] = []
        self.records: list[list[Any]] = []  # none: what a graph computes is known before it runs
        if device.type == "cuda":
            self._capture(device)

    def _capture(self, device: torch.device) -> None:
        """Record one graph for each scale, in order, in one pool of memory."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries set themselves up in their first calls, outside of any graph
            for _ in range(_WARM_UP):
                for k in range(len(self.inputs_BNC)):
                    self._step(k)
        torch.cuda.current_stream(device).wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        for k in range(len(self.inputs_BNC)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._step(k)
            self.graphs.append((graph, logits))

    def _step(self, k: int) -> Tensor:
        return self.model.step(self.conditioning, self.inputs_BNC[k], k, self.cache).logits_BNV

    def begin(self, values: Any) -> None:
        """Take a new batch of the same size."""
        for mine, new in zip(_tensors(self.conditioning), _tensors(self.model.conditioning(values)), strict=True):
            mine.copy_(new)

    def logits(self, inputs_BNC: list[Tensor], k: int) -> Tensor:
        fixed = self.inputs_BNC[k]
        if fixed is not None:
            fixed.copy_(inputs_BNC[-1])
        if not self.graphs:
            return self._step(k)
        graph, logits = self.graphs[k]
        graph.replay()
        return logits.clone()  # the next replay overwrites it


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    return [conditioning.cond_BD, *conditioning.blocks_B3SD, conditioning.head_B2D]


class Captured:
    """Runs steps as `sample.generate.Eager` does, by graphs that are kept for each model and batch size."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Fixed] = {}

    def __call__(self, model: VAR, values: Any, config: SampleConfig) -> _Fixed:
        if config.prune or config.draft_scales:
            raise UserError("captured steps know neither token pruning nor a refiner")
        thresholds = resolve_thresholds(model.config, len(model.pyramid), config)
        if thresholds is not None and min(thresholds.tau_K) < 1:
            raise UserError(
                "captured steps have fixed shapes, dynamic experts have not: sample without capture, or tau 1"
            )
        key = (id(model), len(values))
        if key not in self._kept:
            self._kept[key] = _Fixed(model, values)
        self._kept[key].begin(values)
        return self._kept[key]
