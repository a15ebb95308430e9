"""What is made of a pipeline: one with other adapters, one at another size, and its checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nextscale.checkpoints import Checkpoint, build_on_meta
from nextscale.common.errors import UserError
from nextscale.common.precision import narrow
from nextscale.common.sizes import Size, expand_size
from nextscale.pyramid import Pyramid

if TYPE_CHECKING:
    from nextscale.checkpoints.lora import Adapters
    from nextscale.pipeline import Pipeline


def change_adapters(pipeline: Pipeline, change: Callable[[Adapters], Adapters]) -> Pipeline:
    """The pipeline, which gets the weights with changed adapters in place. UserError where it shares its weights."""
    from nextscale.checkpoints.lora import Adapters

    if pipeline.config.pyramid != pipeline.tokenizer.quantizer.tables:
        raise UserError("this pipeline shares the weights of another one (Pipeline.at): change the adapters of that")
    adapters = pipeline._adapters or Adapters.of_model(pipeline._folder, pipeline.to_checkpoint, pipeline._profile)
    adapters = change(adapters)
    checkpoint = adapters.merge()
    new = pipeline._around(checkpoint, build_on_meta(checkpoint.config)).to(pipeline.device, pipeline._dtype)
    new.optimize(pipeline._backend, training=pipeline._training)
    new.tokenizer.decode_batch, new._adapters = pipeline.tokenizer.decode_batch, adapters
    kept = {name: pipeline.__dict__[name] for name in ("sampling", "_folder", "_profile", "_capture")}
    pipeline.__dict__ = new.__dict__ | kept
    return pipeline


def resize_pipeline(pipeline: Pipeline, scales: str | Pyramid, size: Size) -> Pipeline:
    """See `Pipeline.at`."""
    config, tables = pipeline.config, pipeline.tokenizer.quantizer.tables
    if bool(scales) == bool(size):
        if scales:
            raise UserError("give either scales or a size: they are the same in two forms")
        return pipeline
    known = [tables, *(pyramid for pyramid in config.sizes if pyramid != tables)]
    if size:
        pyramid = choose_pyramid(known, expand_size(size), config.tokenizer.downsampling)
    else:
        pyramid = scales if isinstance(scales, Pyramid) else Pyramid.parse(scales)
    view = copy.copy(pipeline)
    view.config = replace(config, pyramid=pyramid, sizes=tuple(other for other in known if other != pyramid))
    view.tokenizer = pipeline.tokenizer.at(pyramid)
    view._transformer = pipeline._transformer.at(pyramid) if pipeline._transformer is not None else None
    view._refiner, view._refiner_source, view._refiner_labels, view._capturing = None, "", None, None
    return view


def choose_pyramid(known: Sequence[Pyramid], size: tuple[int, int], factor: int) -> Pyramid:
    """The pyramid for images of this height and width, of a tokenizer that downsamples by `factor`: one of the `known`
    ones, else as many scales as the one of the nearest area has, in proportion. UserError where no map has the size."""
    if any(length < factor or length % factor for length in size):
        raise UserError(
            f"images of {size[0]} x {size[1]} pixels have no token map: give multiples of {factor}, by which the "
            "tokenizer downsamples"
        )
    last = size[0] // factor, size[1] // factor
    if trained := [pyramid for pyramid in known if pyramid.last == last]:
        return trained[0]
    area = math.log(last[0] * last[1])
    return min(known, key=lambda pyramid: abs(math.log(pyramid.counts[-1]) - area)).resize(last)


def build_checkpoint(pipeline: Pipeline) -> Checkpoint:
    """See `Pipeline.to_checkpoint`."""
    tokenizer = pipeline.tokenizer.state_dict()
    transformer = {} if pipeline._transformer is None else pipeline._transformer.state_dict()
    for part in (tokenizer, transformer):
        for name, tensor in part.items():
            known = [types[name] for types in (pipeline._stored, pipeline._converted) if name in types]
            part[name] = narrow(tensor, known)
    config, tables = pipeline.config, pipeline.tokenizer.quantizer.tables
    checkpoint = Checkpoint(config, tokenizer, transformer, pipeline._origin, pipeline._extras)
    if config.pyramid == tables:
        return checkpoint
    from nextscale.checkpoints.adapt import adapt, adapt_tokenizer

    checkpoint.config = replace(config, pyramid=tables, sizes=())
    return adapt(checkpoint, None, config.pyramid) if transformer else adapt_tokenizer(checkpoint, config.pyramid)
