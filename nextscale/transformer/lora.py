"""Low-rank adapters (LoRA, arXiv 2106.09685) while they are trained: layers whose weight is W + scale B A.

W stays as it is; B and A are trained. Such a layer computes its `weight` whenever that is read, so all that multiplies
by it works unchanged: attention, experts in one grouped product, fast twins, sharded weights. It costs a product of
rank r for each use, and as much memory as the weight until the backward pass. B starts at 0, so the first outputs are
those of the model. After training the product is added to the weights (`nextscale.checkpoints.lora`), and nothing of
this module is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nextscale.common.errors import UserError
from nextscale.common.precision import disable_autocast
from nextscale.config.lora import LoraConfig
from nextscale.transformer.condition import ClassCondition
from nextscale.transformer.feed_forward.experts import StackedLinear
from nextscale.transformer.feed_forward.routers import Router
from nextscale.transformer.int8 import find_plain_class

if TYPE_CHECKING:
    from nextscale.transformer.var import VAR


class AdaptedWeight(nn.Module):
    """Mixin of a layer whose weight (out, in), or (experts, out, in), is `base_weight` + `scale` `lora_B` `lora_A`."""

    base_weight: nn.Parameter
    lora_A: nn.Parameter
    """(rank, in), or (experts, rank, in)."""
    lora_B: nn.Parameter
    """(out, rank), or (experts, out, rank)."""
    lora_scale: float

    @property
    def weight(self) -> Tensor:
        """The weight that the layer multiplies by."""
        with disable_autocast(self.base_weight):
            return self.base_weight + self.lora_scale * (self.lora_B @ self.lora_A)


class LoraLinear(AdaptedWeight, nn.Linear):  # type: ignore[override]
    """A linear layer with an adapter."""


class LoraStackedLinear(AdaptedWeight, StackedLinear):  # type: ignore[misc]
    """The linear layers of several experts, each with an adapter of its own."""


class ExtendedEmbedding(nn.Embedding):
    """Class embeddings (classes + 1, D) that stay, and rows of new classes, which are trained, before the last one."""

    base_weight: nn.Parameter
    new_rows: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Embeddings of the classes, of the new ones, and of "no label"."""
        return torch.cat([self.base_weight[:-1], self.new_rows, self.base_weight[-1:]])


_ADAPTED: dict[type[nn.Module], type[AdaptedWeight]] = {nn.Linear: LoraLinear, StackedLinear: LoraStackedLinear}


def list_adapted_layers(model: VAR, groups: Collection[str]) -> Iterator[str]:
    """The names of the layers that get adapters: linear layers of the blocks' mixers and feed-forwards, but routers."""
    for i, block in enumerate(model.blocks):
        for group in ("mixers", "ffn"):
            part = getattr(block, group)
            routers = [name for name, module in part.named_modules() if isinstance(module, Router)]
            for name, module in part.named_modules(prefix=f"blocks.{i}.{group}"):
                inside = any(name.startswith(f"blocks.{i}.{group}.{router}.") for router in routers)
                if group in groups and find_plain_class(module) in _ADAPTED and not inside:
                    yield name


def add_adapters(model: VAR, config: LoraConfig, new_rows_ND: Tensor | None, generator: torch.Generator | None) -> None:
    """Freeze a model, in place, and give it adapters and embeddings of new classes to train.

    `new_rows_ND`: initial embeddings of the new classes, which follow those of the model. A is drawn as in the code of
    the paper, uniform in 1 / sqrt(in); B is 0. UserError when the condition of the model has no classes to add to.
    """
    model.requires_grad_(False)
    names = list(list_adapted_layers(model, config.layers)) if config.rank else []
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapt_layer(model.get_submodule(name), config, generator))
    if new_rows_ND is not None:
        condition = model.condition
        if type(condition) is not ClassCondition:
            raise UserError("new classes can be added to models that are conditioned on classes alone")
        condition.embedding = _extend(condition.embedding, new_rows_ND)
        condition.num_classes += len(new_rows_ND)


def _become(kind: type[nn.Module], module: nn.Module) -> Any:
    """The module as one of another class, with its weight frozen under the name `base_weight`."""
    new = cast(Any, kind.__new__(kind))
    new.__dict__.update(module.__dict__)
    parameters = dict(module._parameters)
    weight = cast(Tensor, parameters.pop("weight"))
    new._parameters = {"base_weight": nn.Parameter(weight.detach(), requires_grad=False), **parameters}
    return new


def adapt_layer(layer: nn.Module, config: LoraConfig, generator: torch.Generator | None) -> AdaptedWeight:
    """The layer with an adapter, which is 0."""
    new: AdaptedWeight = _become(_ADAPTED[find_plain_class(layer)], layer)
    *experts, rows, columns = new.base_weight.shape
    if config.rank > min(rows, columns):
        raise UserError(
            f"lora.rank {config.rank} is more than a layer of {columns} inputs and {rows} outputs has; give "
            f"{min(rows, columns)} or less"
        )
    bound = 1 / math.sqrt(columns)
    drawn = torch.empty(*experts, config.rank, columns).uniform_(-bound, bound, generator=generator)
    new.lora_A = nn.Parameter(drawn)
    new.lora_B = nn.Parameter(torch.zeros(*experts, rows, config.rank))
    new.lora_scale = config.scale
    return new


def _extend(embedding: nn.Embedding, new_rows_ND: Tensor) -> ExtendedEmbedding:
    new: ExtendedEmbedding = _become(ExtendedEmbedding, embedding)
    new.new_rows = nn.Parameter(new_rows_ND.clone())
    new.num_embeddings += len(new_rows_ND)
    return new
