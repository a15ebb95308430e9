"""What is rehearsed: each case builds a small model on the rehearsed device and runs one thing that users run."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from nextscale.backends import optimize
from nextscale.backends.cuda import dynamic
from nextscale.backends.cuda.graphs import FixedSteps
from nextscale.backends.cuda.tiles import TorchProducts
from nextscale.checkpoints import build_modules
from nextscale.common.distributed import World
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.encoder import EncoderConfig, MocoConfig, ViewConfig
from nextscale.config.model import ModelConfig
from nextscale.config.tokenizer_training import CodebookConfig, TokenizerLossConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import MVAR_MIXERS, AlignmentConfig, DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.data.examples import MemoryExamples
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.pipeline import Pipeline
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.sparsify.tasks import AdaptTask, RouterTask, TuneTask
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.classifier import ClassifierTask, measure_classifier
from nextscale.training.encoder import EncoderTask, encode_images
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.engine.task import Task
from nextscale.training.tokenizer import TokenizerTask, evaluate_tokenizer
from nextscale.training.transformer import TransformerTask
from nextscale.training.validation import validate
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import tiny_config
from tests.rehearsal.watch import rehearse

DEVICE = torch.device("cuda", 0)
SCALES = "1,2,4"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    **{router: {"experts": ExpertsConfig(router=router, count=4, active=2), "depth": depth} for router, depth in (
        ("smoe", 1), ("stmoe", 1), ("moe++", 2), ("expert-choice", 1)  # a block of MoE++ reads the one before
    )},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)},
    "dynamic": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8, router_fingerprint="trained")},
    "late": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8, router_fingerprint="trained",
                                      late_ffn=True, activation="relu")},
}  # fmt: skip
TAU = {"tau": (0.6, 0.3)}
Output = dict[str, Tensor]


def configure(family: str, **changes: Any) -> ModelConfig:
    """A model of one block, or as many as the family needs, and three scales."""
    return tiny_config(SCALES, **{"depth": 1, **FAMILIES[family], **changes})


def build(family: str, dtype: torch.dtype = torch.float32, training: bool = False, **changes: Any) -> Pipeline:
    """A pipeline on the device."""
    config = configure(family, **changes)
    with torch.device(DEVICE):
        pipeline = Pipeline(config, *build_modules(config))
    return pipeline.to(DEVICE, dtype).optimize(training=training)


# ---- inference


def sample(family: str, dtype: torch.dtype, depth: int = 0, **settings: Any) -> Output:
    """Two images; guided unless the settings turn that off."""
    images = build(family, dtype, **({"depth": depth} if depth else {})).sample([0, 4], top_k=9, **settings)
    return {"tokens": images.tokens, "images": images.tensor}


def sample_with_refiner() -> Output:
    """CoDe: the prefill of another model in the middle."""
    pipeline = build("dense")
    pipeline._refiner = build("stmoe").transformer
    images = pipeline.sample([0, 4], draft_scales=1)
    return {"tokens": images.tokens, "images": images.tensor}


def prefill(family: str, dtype: torch.dtype) -> Output:
    """All scales but the last in one pass."""
    pipeline = build(family, dtype)
    model, k = pipeline.transformer, len(pipeline.config.pyramid) - 2
    conditioning = model.embed_condition(model.condition.parse([0, 4]))
    length = model.pyramid.spans[k][1] - model.pyramid.counts[0]
    inputs = torch.zeros(2, length, pipeline.config.tokenizer.code_width, device=DEVICE)
    with torch.no_grad():
        return {"logits": model.prefill(conditioning, inputs, k, model.new_cache(2)).logits_BNV}


def run_fixed_steps(family: str, dtype: torch.dtype) -> Output:
    """A batch on the fixed memory of captured steps: what a graph would record."""
    pipeline = build(family, dtype)
    model, values = pipeline.transformer, pipeline.transformer.condition.parse([0, 4])
    steps = FixedSteps(model, values)
    steps.set_condition(values)
    for k, count in enumerate(model.pyramid.counts):
        inputs = torch.zeros(2, count, pipeline.config.tokenizer.code_width, device=DEVICE) if k else None
        with torch.no_grad():
            logits = steps.predict(inputs, k)
    return {"logits": logits}


class Kernels:
    """In place of the Triton kernels, which no CPU tensor can be given: torch computes what they are launched for."""

    def __init__(self) -> None:
        self.launched = 0

    def multiply(self, *given: Any, **options: Any) -> Tensor:
        self.launched += 1
        return TorchProducts().multiply(*given, **options)


def run_with_kernels(run: Callable[[], Output]) -> Output:
    """As where Triton is installed: dynamic experts go to their tiles."""
    kernels = Kernels()
    with patch.object(dynamic, "load_products", lambda device: kernels):
        outputs = run()
    assert kernels.launched, "no kernel was reached"
    return outputs


def edit(dtype: torch.dtype) -> Output:
    """An image, encoded, half of which is generated anew."""
    from nextscale.sampling.editing import build_edit
    from nextscale.sampling.sampler import sample_images

    pipeline = build("dense", dtype)
    tokens = pipeline._encode_images(torch.zeros(1, 3, 8, 8))
    made = build_edit(torch.zeros(8, 8), tokens, pipeline.config)
    sampler = pipeline._build_sampler(
        pipeline.transformer.condition.parse([1]), pipeline._parse_settings(None, {"smooth": True}), 0, (), edit=made
    )
    images = sample_images(sampler)
    return {"tokens": images.tokens_BL, "images": images.images_B3HW}


def tokenize_and_decode(dtype: torch.dtype) -> Output:
    """Images to tokens and back."""
    pipeline = build("dense", dtype)
    tokens = pipeline.tokenizer.encode(scale_to_unit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=DEVICE)))
    return {"tokens": tokens, "images": pipeline.tokenizer.decode(tokens)}


def score(dtype: torch.dtype) -> Output:
    """Log-likelihood of given tokens."""
    pipeline = build("stmoe", dtype)
    tokens = torch.zeros(2, pipeline.config.pyramid.length, dtype=torch.int64, device=DEVICE)
    values = pipeline.transformer.condition.parse([0, 4])
    return {"likelihood": compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens, values)}


def extract() -> Output:
    """Evaluation features of a network, in batches, as `extract.py` does, whose checksums of pixels need values."""

    with torch.device(DEVICE):
        network = Classifier(ClassifierConfig(image_size=8, widths=(16, 32), groups=8), ("a", "b"))
    return network(torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=DEVICE)).to_dict()


# ---- training


class Ended(Exception):
    """The rehearsal of a training run is over."""


class _Rehearsed(Callbacks):
    def __init__(self, measure: Callable[[], object]):
        self.measure = measure

    def validate(self, step: int) -> dict[str, Any]:
        self.measure()
        return {}

    def save_model(self, step: int, best: bool) -> None:
        raise Ended


def run_training(make: Callable[[TrainConfig], Task], precision: str, micro_batch: int | Literal["auto"] = 0) -> Output:
    """A step of a training run: forward, backward, optimizer, average and log; in float32 also its state and what is
    measured with it."""
    saves = precision == "float32"
    config = TrainConfig(
        steps=1 if saves else 2, batch_size=4, micro_batch=micro_batch, log_every=1, warmup_steps=0, ema=0.5,
        precision=precision,
    )  # fmt: skip
    world = World(device=DEVICE)
    with torch.device(DEVICE):
        task = make(config)
    if not saves:
        end_before_second_step(task)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(task, config, Path(folder), _Rehearsed(partial(measure_task, task, world)), world=world)
        except Ended:
            pass
        else:
            raise AssertionError("the run did not come to what ends its rehearsal")
    return {f"weight {i}": p for i, p in enumerate(task.trained.parameters()) if p.requires_grad}


def end_before_second_step(task: Task) -> None:
    """End the run where the second step draws its noise."""
    draw, steps = task.draw_noise, iter([True])

    def draw_once(count: int, rng: torch.Generator) -> dict[str, Tensor]:
        if not next(steps, False):
            raise Ended
        return draw(count, rng)

    task.draw_noise = draw_once  # type: ignore[method-assign]


def measure_task(task: Task, world: World) -> None:
    """What the task's own callbacks compute at a save."""
    if isinstance(task, TokenizerTask):
        evaluate_tokenizer(task.tokenizer, task.examples)
    elif isinstance(task, ClassifierTask):
        measure_classifier(task, task.examples)
    elif isinstance(task, EncoderTask):
        task.encoder.compute_statistics(
            [scale_to_unit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=world.device))]
        )
        encode_images(task.encoder, task.examples, 4, [])
    else:
        validate(task, task.examples, 4, world)


def images(count: int = 6) -> Tensor:
    return torch.zeros(count, 3, 8, 8, dtype=torch.uint8, device="cpu")


def labels(count: int = 6) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device="cpu")


def make_transformer_task(family: str, config: TrainConfig, aligned: bool = False) -> Task:
    changes = {"alignment": AlignmentConfig(width=6, hidden=16, block=1)} if aligned else {}
    model = configure(family, **changes)
    tokenizer, transformer = build_modules(model)
    assert transformer is not None, "the config has one"
    optimize(tokenizer)
    examples = {"label": labels()}
    if aligned:  # images, so that they are encoded in the step
        examples |= {"image": images(), "features": torch.zeros(6, 4, 4, 6, device="cpu")}
    else:
        examples |= {"tokens": torch.zeros(6, model.pyramid.length, dtype=torch.int64, device="cpu")}
    loss = LossConfig(encoder="cache", group="1,2") if aligned else LossConfig()
    return TransformerTask(transformer, tokenizer, MemoryExamples(**examples), config, loss)


def make_sparsify_task(kind: str, config: TrainConfig) -> Task:
    model = configure("late" if kind == "tune" else "dynamic")
    tokenizer, transformer = build_modules(model)
    assert transformer is not None, "the config has one"
    optimize(tokenizer)
    tokens = torch.zeros(6, model.pyramid.length, dtype=torch.int64, device="cpu")
    parts = transformer, tokenizer, MemoryExamples(tokens=tokens, label=labels()), config
    if kind == "tune":
        return TuneTask(*parts, hoyer=0.1)
    if kind == "routers":
        return RouterTask(*parts)
    return AdaptTask(*parts, Thresholds.create(model.transformer, len(model.pyramid), (0.6, 0.3), "threshold"))


def make_tokenizer_task(config: TrainConfig, adversarial: bool = False) -> Task:
    tokenizer, _ = build_modules(replace(configure("dense"), transformer=None))
    losses = TokenizerLossConfig(
        adversarial=0.5 if adversarial else 0.0, adversarial_start=0, discriminator_channels=4, discriminator_layers=1
    )
    codebook = CodebookConfig(update="ema", revive_every=1) if adversarial else CodebookConfig()
    return TokenizerTask(tokenizer, MemoryExamples(image=images()), losses, codebook)


def make_classifier_task(config: TrainConfig) -> Task:
    model = Classifier(ClassifierConfig(image_size=8, widths=(16, 32), groups=8), ("a", "b"))
    return ClassifierTask(model, MemoryExamples(image=images(), label=labels()), max_shift=1, label_smoothing=0.1)


def make_encoder_task(config: TrainConfig) -> Task:
    encoder = SmallEncoder(EncoderConfig(8, (8, 16), (1, 1), 4))
    return EncoderTask(
        encoder, MemoryExamples(image=images(), label=labels()), MocoConfig(16, 0.9, 0.2, 16, 8), ViewConfig()
    )


TASKS: dict[str, Callable[[TrainConfig], Task]] = {
    **{f"transformer {family}": partial(make_transformer_task, family) for family in FAMILIES},
    "transformer guided": partial(make_transformer_task, "stmoe", aligned=True),
    **{f"sparsify {kind}": partial(make_sparsify_task, kind) for kind in ("tune", "routers", "adapt")},
    "tokenizer": make_tokenizer_task,
    "tokenizer adversarial": partial(make_tokenizer_task, adversarial=True),
    "classifier": make_classifier_task,
    "encoder": make_encoder_task,
}

SIMILAR = {"smoe": "float32", "moe++": "bfloat16", "expert-choice": "float16", "late": "float32", "guided": "bfloat16",
           "mvar": "bfloat16", "tokenizer": "float16"}  # fmt: skip
"""Variants that differ from another one in nothing that depends on the precision, and the one that they run in."""


def list_precisions(name: str) -> list[str]:
    """The precisions in which a family is sampled, or a task trained."""
    only = SIMILAR.get(name.split()[-1])
    return [only] if only else list(DTYPES)


CASES: dict[str, Callable[[], Output]] = {
    **{f"sample {family} {name}": partial(
           sample, family, DTYPES[name], **(TAU if family in ("dynamic", "late") else {})
       ) for family in FAMILIES for name in list_precisions(family)},
    **{f"sample with kernels {family} {name}": partial(
           run_with_kernels, partial(sample, family, DTYPES[name], **TAU)
       ) for family, name in (("dynamic", "bfloat16"), ("dynamic", "float16"), ("late", "float32"))},
    "sample smooth": partial(sample, "dense", torch.float32, smooth=True, cfg=0.0),
    "sample pruned": partial(sample, "stmoe", torch.float32, prune=(0.4, 0.5), prune_first_block=1, depth=2),
    "sample oracle": partial(sample, "dynamic", torch.bfloat16, **TAU, selection="oracle"),
    "sample with refiner": sample_with_refiner,
    **{f"prefill {family}": partial(prefill, family, torch.bfloat16) for family in ("moe++", "mvar")},
    **{f"fixed steps {family} {name}": partial(run_fixed_steps, family, DTYPES[name])
       for family, name in (("dense", "bfloat16"), ("stmoe", "float32"), ("moe++", "float16"), ("mvar", "float32"))},
    "edit float16": partial(edit, torch.float16),
    **{f"tokenize and decode {name}": partial(tokenize_and_decode, dtype) for name, dtype in DTYPES.items()},
    "score bfloat16": partial(score, torch.bfloat16),
    "extract features": extract,
    **{f"train {task} {precision}": partial(run_training, make, precision)
       for task, make in TASKS.items() for precision in list_precisions(task)},
    "train with auto": partial(run_training, TASKS["classifier"], "float32", micro_batch="auto"),
    "train in micro-batches": partial(run_training, TASKS["transformer dense"], "float16", micro_batch=2),
}  # fmt: skip


def run_case(name: str) -> dict[str, Any]:
    """What a case did: its waits and products by place, its outputs, and its error if there was one."""
    error, outputs = "", {}
    with rehearse() as watch:
        try:
            outputs = CASES[name]()
        except Exception:  # anything that a user would see is a finding
            error = traceback.format_exc()
    return {
        "waits": dict(watch.waits),
        "products": {place: sorted(dtypes) for place, dtypes in watch.products.items()},
        "slow_sums": watch.slow_sums,
        "outputs": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in outputs.items()},
        "error": error,
    }
