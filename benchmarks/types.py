"""Processor time of a type beside another's, float32's by default, for each family of models or for one model.

    python -m benchmarks.types sampling [--dtype bfloat16] [--widths 256 1024] [--batches 1 16] [--rounds 5]
    python -m benchmarks.types sampling --dtype int8 --base bfloat16 --model var-d16 --batches 1
    python -m benchmarks.types training [--dtype bfloat16] [--widths 256] [--batches 16] [--rounds 5]
    python -m benchmarks.types tokenizer [--dtype bfloat16] [--batches 1 16] [--rounds 5] [--threads 1]

Random weights; without --model 3 blocks and scales 1 to 8; with guidance. The two types take turns; a line gives the
median of the rounds' ratios and their range. The last line is JSON. `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`
makes any x86 CPU one without bfloat16 instructions and VNNI.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nextscale.backends import keep_freed_memory, optimize
from nextscale.common.machine import describe_machine
from nextscale.common.precision import choose_training_dtype, find_dtype, lower_precision
from nextscale.config.model import ModelConfig
from nextscale.config.presets import preset
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import (
    MVAR_MIXERS,
    ConditionConfig,
    DynamicConfig,
    ExpertsConfig,
    MambaConfig,
    TransformerConfig,
)
from nextscale.doctor.models import randomise
from nextscale.evaluation.latency import summarize_spread
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "M-VAR": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=64, head_width=64)},
    "mixture of experts": {"experts": ExpertsConfig(router="stmoe", count=8, active=3)},
    "dynamic experts": {
        "dynamic": DynamicConfig(experts=32, scales=3, tau=(0.9, 0.8, 0.7), router_fingerprint="random")
    },
}
SCALES = "1,2,3,4,5,6,8"
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "training", "tokenizer"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "int8"])
    parser.add_argument("--base", default="float32", choices=["float32", "bfloat16"], help="what it is compared with")
    parser.add_argument("--model", default="", help="a preset in place of the families, for sampling")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024], help="multiples of 64")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.what != "sampling" and (options.dtype == "int8" or options.base != "float32" or options.model):
        parser.error("int8, --base and --model are for sampling")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    list_cases = {"sampling": list_sampling, "training": list_training, "tokenizer": list_tokenizer}[options.what]
    report = []
    for name, full, low in list_cases(options):
        ratios = time_in_turns(full, low, options.rounds)
        report.append({"case": name, **ratios})
        print(f"{name:<44}{ratios['median']:.2f} ({ratios['min']:.2f} to {ratios['max']:.2f})", flush=True)
    about = {
        "what": options.what,
        "dtype": options.dtype,
        "base": options.base,
        "machine": describe_machine(torch.device("cpu")),
    }
    print(json.dumps({**about, "ratios": report}))


Case = tuple[str, Callable[[], object], Callable[[], object]]
"""A name, what runs in the type compared with, and the same in the other one."""


def time_in_turns(full: Callable[[], object], low: Callable[[], object], rounds: int) -> dict[str, float]:
    """Processor time of `low` over that of `full`: median, smallest and largest of the rounds after the first one."""
    ratios = []
    for turn in range(rounds + 1):
        seconds = []
        for run in (full, low) if turn % 2 else (low, full):
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        ratios.append(seconds[1] / seconds[0] if turn % 2 else seconds[0] / seconds[1])
    return summarize_spread(ratios[1:])


def list_models(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Pipeline]]]:
    """Name and maker of each model of the options, with the plain modules."""
    if options.model:
        yield options.model, lambda: create_preset(options.model)
        return
    for width in options.widths:
        for family in options.families:
            yield f"{family}, width {width}", partial(create_pipeline, family, width)


def create_preset(name: str) -> Pipeline:
    """A named model with random weights."""
    pipeline = Pipeline.from_config(preset(name), backend="plain")
    randomise(pipeline)
    return pipeline


def create_pipeline(family: str, width: int) -> Pipeline:
    """A generator with random weights and the plain modules."""
    tokenizer = TokenizerConfig(vocab_size=4096, code_width=32, base_channels=32, channel_multipliers=(1, 2))
    transformer = TransformerConfig(depth=3, width=width, heads=width // 64, **FAMILIES[family])
    transformer = dataclasses.replace(transformer, condition=ConditionConfig(num_classes=CLASSES))
    pipeline = Pipeline.from_config(ModelConfig(Pyramid.parse(SCALES), tokenizer, transformer), backend="plain")
    randomise(pipeline)
    return pipeline


def list_sampling(options: argparse.Namespace) -> Iterator[Case]:
    """Whole images, from labels to pixels."""
    for name, create in list_models(options):
        pipelines = [
            create().to("cpu", dtype).optimize() for dtype in (find_dtype(options.base), find_dtype(options.dtype))
        ]
        for batch in options.batches:

            def sample(pipeline: Pipeline, batch: int = batch) -> object:
                return pipeline.sample([i % CLASSES for i in range(batch)], seed=0, batch_size=batch, cfg=1.5)

            full, low = (lambda pipeline=pipeline: sample(pipeline) for pipeline in pipelines)
            yield f"{name}, batch {batch}", full, low


def list_training(options: argparse.Namespace) -> Iterator[Case]:
    """A forward and a backward pass, as a precision of that name has it."""
    computed = choose_training_dtype(options.dtype, torch.device("cpu"))
    for width in options.widths:
        for family in options.families:
            pipeline = create_pipeline(family, width)
            model = optimize(pipeline.transformer.requires_grad_(True), training=True)
            for batch in options.batches:
                rng = torch.Generator().manual_seed(0)
                tokens = torch.randint(0, 4096, (batch, pipeline.config.pyramid.length), generator=rng)
                labels, inputs = torch.arange(batch) % CLASSES, pipeline.tokenizer.teacher_inputs(tokens)

                def step(dtype: torch.dtype, model: Any = model, given: Any = (labels, inputs, tokens)) -> None:
                    labels, inputs, tokens = given
                    with lower_precision(torch.device("cpu"), dtype):
                        logits = model(labels, inputs).logits_BNV
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()

                yield f"{family}, width {width}, batch {batch}", lambda: step(torch.float32), lambda: step(computed)


def list_tokenizer(options: argparse.Namespace) -> Iterator[Case]:
    """Images to tokens, and tokens to images, with the width of VAR's tokenizer."""
    config = TokenizerConfig(base_channels=160, code_width=32, channel_multipliers=(1, 1, 2, 2, 4))
    pipelines = []
    for dtype in (torch.float32, find_dtype(options.dtype)):
        pipeline = Pipeline.from_config(ModelConfig(Pyramid.parse("1,2,3,4"), config, None), backend="plain")
        pipelines.append(pipeline.to("cpu", dtype).optimize())
    for batch in options.batches:
        images = torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        tokens = pipelines[0].tokenizer.encode(images)
        for name, given in (("encode", images), ("decode", tokens)):

            @torch.no_grad()
            def use(pipeline: Pipeline, name: str = name, given: torch.Tensor = given) -> object:
                return getattr(pipeline.tokenizer, name)(given)

            full, low = (lambda pipeline=pipeline: use(pipeline) for pipeline in pipelines)
            yield f"{name}, batch {batch}", full, low


if __name__ == "__main__":
    main()
