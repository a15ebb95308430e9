"""The bytes that training a transformer keeps for the backward pass, counted on tensors without storage.

Autocast and attention that keeps no matrix of weights do not exist for such tensors, so they are imitated.
tests/test_memory.py compares the counts with what autograd keeps of real tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nextscale.config.training import TrainConfig
from nextscale.training.engine.memory import Activations, SavedTensors
from nextscale.transformer.block import Block
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward import Record
from nextscale.transformer.var import VAR

_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.matmul, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip


def count_activations(transformer: VAR, train: TrainConfig, guided: int = 0) -> Activations:
    """Bytes that a forward pass with its cross-entropy keeps for the backward pass.

    `transformer`: on device meta. `guided`: scales that the alignment head projects. Precision auto counts as bfloat16.
    """
    one, two = (_count_pass(transformer, train, guided, images) for images in (1, 2))
    return Activations.from_passes(one, two, 1)


def _count_pass(transformer: VAR, train: TrainConfig, guided: int, images: int) -> int:
    """Bytes of a pass with so many images. Of blocks that are alike one is computed, and counted for all of them."""
    saved = SavedTensors(transformer)
    shallow = copy.copy(transformer)
    shallow._modules = dict(transformer._modules)
    repeats = _count_repeats(transformer.blocks)
    shallow.blocks = nn.ModuleList(  # type: ignore[assignment]
        _CountedBlock(block, times, saved) for block, times in zip(transformer.blocks, repeats, strict=True)
    )
    pyramid = transformer.pyramid
    length = pyramid.length - pyramid.counts[0]
    with torch.device("meta"):
        x_BLC = torch.empty(images, length, transformer.word_embed.in_features)
        tokens_BL = torch.zeros(images, pyramid.length, dtype=torch.int64)
    with saved.watch(), _ImitatedKernels(torch.float32 if train.precision == "float32" else torch.bfloat16):
        logits_BLV = shallow(transformer.condition.nothing(images), x_BLC, aligned_scales=guided).logits_BNV
        F.cross_entropy(logits_BLV.float().flatten(0, 1), tokens_BL.flatten())
    if not train.activation_checkpointing:
        return saved.total
    depth, width = transformer.config.depth, transformer.config.width
    return saved.total // depth + images * depth * pyramid.length * width * 4


class _ImitatedKernels(TorchFunctionMode):
    """Products in a type, as autocast computes them, and attention that keeps its inputs and outputs alone."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weights: dict[int, Tensor] = {}
        """Weights in that type: autocast keeps one copy of each."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*map(self._cast, args[:3]))
        if func in _PRODUCTS:
            args, kwargs = tuple(map(self._cast, args)), {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or self.dtype == torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.dtype)
        return self.weights.setdefault(id(value), value.to(self.dtype))


class _Attention(torch.autograd.Function):
    """What attention keeps: queries, keys, values, the result, and one sum for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("activations are counted in the forward pass")


def _count_repeats(blocks: Sequence[Block]) -> list[int]:
    """How many blocks each one stands for: the first of a kind for all of it, the others for none.

    What comes from the block before belongs to the kind, so the first block of all is of its own.
    """
    kinds: list[Any] = []
    for block in blocks:
        modules, parameters = block.named_modules(), block.named_parameters()
        kinds.append(((*((n, type(m)) for n, m in modules),), (*((n, p.shape) for n, p in parameters),)))
    pairs = list(zip([None, *kinds], kinds, strict=False))
    return [pairs.count(pair) if pairs.index(pair) == i else 0 for i, pair in enumerate(pairs)]


class _CountedBlock(nn.Module):
    """A block whose tensors are counted so many times; with 0 it is not computed."""

    def __init__(self, block: Block, times: int, saved: SavedTensors):
        super().__init__()
        self.block, self.adaln, self.times, self.saved = block, block.adaln, times, saved
        self.read_condition = block.read_condition

    def forward(
        self,
        x_BND: Tensor,
        adaln_B3SD: Tensor,
        context: ScaleContext,
        states: list[Any] | None,
        previous: Record | None,
    ) -> tuple[Tensor, Record | None]:
        if not self.times:
            self.saved.ignore(x_BND)  # the block that stands for this one counts its input
            return x_BND + 0, previous  # a tensor of its own, as a block's output is
        self.saved.times = self.times
        result = self.block(x_BND, adaln_B3SD, context, states, previous)
        self.saved.times = 1
        return result
