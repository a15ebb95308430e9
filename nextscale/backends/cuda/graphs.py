"""A transformer's steps captured as CUDA graphs: at small batches a GPU otherwise waits for kernel launches.

One graph for each scale, replayed for every batch of the same size. On a CPU the same steps run without graphs, on the
same fixed memory, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from nextscale.transformer.var import VAR, Conditioning, Output

_WARM_UP = 2


class _CapturedSteps:
    """The steps of one model for a fixed number of sequences: inputs, conditioning, caches and logits stay in place."""

    def __init__(self, model: VAR, values: Any):
        self.model, self.conditioning = model, model.embed_condition(values)
        self.cache = model.new_cache(len(values))
        self.inputs_BNC: list[Tensor | None] = [None]
        width, device = model.word_embed.in_features, self.conditioning.cond_BD.device
        for count in model.pyramid.counts[1:]:
            self.inputs_BNC.append(torch.zeros(len(values), count, width, device=device))
        self.graphs: list[tuple[Any, Tensor]] = []
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

    def set_condition(self, values: Any) -> None:
        """Take a new batch of the same size."""
        for target, source in zip(
            _tensors(self.conditioning), _tensors(self.model.embed_condition(values)), strict=True
        ):
            target.copy_(source)

    def predict(self, x_BNC: Tensor | None, k: int) -> Tensor:
        """Logits (B, N, V) of scale k."""
        fixed_BNC = self.inputs_BNC[k]
        if fixed_BNC is not None:
            assert x_BNC is not None, "every scale but the first has an input"
            fixed_BNC.copy_(x_BNC)
        if not self.graphs:
            return self._step(k)
        graph, logits = self.graphs[k]
        graph.replay()
        return logits.clone()  # the next replay overwrites it


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    return [conditioning.cond_BD, *conditioning.blocks_B3SD, conditioning.head_B2D]


class CapturedPredictor:
    """A predictor by captured steps, which belong to it alone until it is garbage-collected."""

    def __init__(self, steps: _CapturedSteps):
        self.steps = steps

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        return Output(self.steps.predict(x_BNC, k), [])  # records would need fixed memory of their own


class GraphPool:
    """Captured steps that no predictor uses, by model and batch size; captures new ones when there are none.

    Graphs hold addresses of weights. So they are dropped when the model's weights are elsewhere than at the capture.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[_CapturedSteps]] = {}
        """By number of sequences."""
        self._weights: tuple[Any, ...] = ()

    @torch.no_grad()
    def create_predictor(self, model: VAR, values: Any) -> CapturedPredictor:
        """A predictor for this batch, on captured steps that no other predictor uses at the time."""
        weights = _locate_weights(model)
        if weights != self._weights:
            self._free, self._weights = {}, weights
        free = self._free.setdefault(len(values), [])
        steps = free.pop() if free else _CapturedSteps(model, values)
        steps.set_condition(values)
        predictor = CapturedPredictor(steps)
        weakref.finalize(predictor, free.append, steps).atexit = False
        return predictor


def _locate_weights(model: VAR) -> tuple[Any, ...]:
    """Which tensors the model's weights are, their dtypes and, on a GPU, their addresses."""
    tensors = (*model.parameters(), *model.buffers())
    return id(model), *((id(t), t.dtype, t.device, t.data_ptr() if t.is_cuda else 0) for t in tensors)
