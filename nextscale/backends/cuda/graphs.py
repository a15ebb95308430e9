"""A transformer's steps captured as CUDA graphs: at small batches a GPU otherwise waits for kernel launches.

One graph for each scale, replayed for every batch of the same size. On a CPU the same steps run without graphs, on the
same fixed memory, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.transformer.context import index_rows
from nextscale.transformer.positions import compute_rotation
from nextscale.transformer.var import VAR, Conditioning, Output

if TYPE_CHECKING:
    from nextscale.transformer.feed_forward.thresholds import Thresholds

MOST_IDLE = 4
"""Captured steps that are kept while nothing uses them; each holds caches for its batch."""
_WARM_UP = 2


class FixedSteps:
    """The steps of one model for a fixed number of sequences: inputs, conditioning, caches and logits stay in place.

    `sequences_K`: how many of the sequences each scale runs, all of `values` at the first; None: all at every scale.
    """

    @torch.no_grad()
    def __init__(
        self, model: VAR, values: Any, thresholds: Thresholds | None = None, sequences_K: Sequence[int] | None = None
    ):
        self.model, self.thresholds = model, thresholds
        self.sequences_K = sequences_K or [len(values)] * len(model.pyramid)
        self.conditioning, self.cache = model.embed_condition(values), model.new_cache(len(values))
        self.inputs_BNC: list[Tensor | None] = [None]
        width, self.device = model.word_embed.in_features, self.conditioning.cond_BD.device
        for sequences, tokens in zip(self.sequences_K[1:], model.pyramid.counts[1:], strict=True):
            self.inputs_BNC.append(torch.zeros(sequences, tokens, width, device=self.device))
        # steps read them from caches: made now, outside of any graph, and held while the graphs have their addresses
        self.constants = list_constants(model)
        self.graphs: list[tuple[Any, Tensor]] = []
        self.done: Any = None
        """An event after the last replay, which may be on another stream than the next batch."""

    @torch.no_grad()
    def capture(self) -> None:
        """Record one graph for each scale, in order, in one pool of memory."""
        with self._select_device():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up in their first calls, outside of any graph
                for _ in range(_WARM_UP):
                    for k in range(len(self.inputs_BNC)):
                        self._step(k)
            torch.cuda.current_stream().wait_stream(side)
            pool, self.done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
            for k in range(len(self.inputs_BNC)):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._step(k)
                self.graphs.append((graph, logits))

    def _select_device(self) -> AbstractContextManager[object]:
        """Streams and graphs belong to the current device, whichever the tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _step(self, k: int) -> Tensor:
        count = self.sequences_K[k]
        conditioning, cache = self.conditioning.first(count), self.model.first_of_cache(self.cache, count)
        return self.model.step(conditioning, self.inputs_BNC[k], k, cache, thresholds=self.thresholds).logits_BNV

    def set_condition(self, values: Any) -> None:
        """Take a new batch of the same size."""
        with self._select_device():
            if self.done is not None:
                self.done.wait()
            for target, source in zip(
                _tensors(self.conditioning), _tensors(self.model.embed_condition(values)), strict=True
            ):
                target.copy_(source)

    def predict(self, x_BNC: Tensor | None, k: int) -> Tensor:
        """Logits of scale k, of as many sequences as it runs."""
        fixed_BNC = self.inputs_BNC[k]
        if fixed_BNC is not None:
            assert x_BNC is not None, "every scale but the first has an input"
            fixed_BNC.copy_(x_BNC)
        if not self.graphs:
            return self._step(k)
        graph, logits = self.graphs[k]
        with self._select_device():
            graph.replay()
            result = logits.clone()  # the next replay overwrites it
            self.done.record()
        return result


def list_constants(model: VAR) -> list[Tensor]:
    """Tensors of the pyramid that steps read from caches: a captured graph has their addresses."""
    device, config = model.pos_start.device, model.config
    rows_L = index_rows(model.pyramid, model.other_tables, device)
    if config.positions.kind != "rotary":
        return [rows_L]
    return [rows_L, *compute_rotation(model.pyramid, config.positions, config.width // config.heads, device)]


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    states = [t for block in conditioning.states if block for state in block if state for t in state]
    return [conditioning.cond_BD, *conditioning.blocks_B3SD, conditioning.head_B2D, *states]


class CapturedPredictor:
    """A predictor by captured steps, which belong to it alone until it is garbage-collected."""

    def __init__(self, steps: FixedSteps):
        self.steps = steps

    def __call__(self, x_BNC: Tensor | None, k: int) -> Output:
        return Output(self.steps.predict(x_BNC, k), [])  # records would need fixed memory of their own


class GraphPool:
    """Captured steps that no predictor uses, the least recently used first; captures new ones when none fits.

    Graphs hold addresses of weights and the kernels that were chosen. So they are dropped when the model's weights are
    elsewhere, or TF32 is allowed otherwise, than at the capture.
    """

    def __init__(self) -> None:
        self._idle: list[tuple[Any, FixedSteps]] = []
        """What the steps were captured for (sequences at each scale, thresholds), and the steps."""
        self._state: tuple[Any, ...] = ()

    @torch.no_grad()
    def create_predictor(
        self, model: VAR, values: Any, thresholds: Thresholds | None = None, sequences_K: Sequence[int] | None = None
    ) -> CapturedPredictor:
        """A predictor for this batch, on captured steps that no other predictor uses at the time.

        `sequences_K`: how many of the sequences each scale runs (guidance that ends); None: all.
        """
        state = _describe_state(model)
        if state != self._state:
            self._idle, self._state = [], state
        sequences_K = tuple(sequences_K or [len(values)] * len(model.pyramid))
        key = sequences_K, thresholds
        steps = self._take(key)
        if steps is None:
            steps = FixedSteps(model, values, thresholds, sequences_K)
            if steps.device.type == "cuda":
                steps.capture()
        steps.set_condition(values)
        predictor = CapturedPredictor(steps)
        weakref.finalize(predictor, _give_back, self._idle, key, steps).atexit = False
        return predictor

    def _take(self, key: Any) -> FixedSteps | None:
        """Idle steps for this key, the last used, out of the pool."""
        for i in reversed(range(len(self._idle))):
            if self._idle[i][0] == key:
                return self._idle.pop(i)[1]
        return None


def _give_back(idle: list[tuple[Any, FixedSteps]], key: Any, steps: FixedSteps) -> None:
    """Put steps back; into a list that nobody has any more when the weights have changed since."""
    idle.append((key, steps))
    del idle[:-MOST_IDLE]


def _describe_state(model: VAR) -> tuple[Any, ...]:
    """Which tensors the model's weights are, their dtypes and, on a GPU, their addresses; and whether TF32 is used."""
    tensors = (*model.parameters(), *model.buffers())
    weights = ((id(t), t.dtype, t.device, t.data_ptr() if t.is_cuda else 0) for t in tensors)
    matmul: Any = torch.backends.cuda.matmul
    return id(model), matmul.fp32_precision, *weights
