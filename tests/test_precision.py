"""Types: what is stored in 16 bits and computed in float32, what is always computed in full float32, and the words."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale.backends.cpu import conversion
from nextscale.cli.parser import parse
from nextscale.common import precision
from nextscale.common.devices import find_device
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.precision import choose_training_dtype, get_name, is_computed_in_float32, is_fast
from nextscale.config.migrate import migrate_record, restore_record
from nextscale.config.parse import to_dict
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import MVAR_MIXERS, DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.pipeline import Pipeline
from nextscale.training.open_run import resolve_precision
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import randomised, tiny_config

FAMILIES = {
    "dense": {},
    "shared": {"shared_adaln": True, "qk_norm": False},
    "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "zero-computation": {"experts": ExpertsConfig("moe++", 4, 2, constant=1, capacity_factor=0.8)},
    "dynamic": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8)},
    "late": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8, late_ffn=True, activation="relu")},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(head_width=8, state_width=16)},
}
slow_float16 = pytest.mark.skipif(is_fast(torch.float16, "cpu"), reason="this CPU is fast in float16")


LIMITS = {"AVX2": False, "AVX512_CORE": False, "AVX512_CORE_VNNI": False, "AVX512_CORE_BF16": True, "ALL": True}
"""Of oneDNN: whether bfloat16 may be fast."""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="no Linux on x86-64")
def test_bfloat16_is_fast_where_the_processor_has_its_instructions():
    """Compared with the kernel's list of instructions, in processes with each limit: torch asks once."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    available = not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
    code = "import torch; from nextscale.common.precision import is_fast; print(is_fast(torch.bfloat16, 'cpu'))"
    for limit, allowed in LIMITS.items():
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(available and allowed), limit


@slow_float16
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_of_16_bits_are_computed_in_float32_where_that_is_faster(family, training, monkeypatch):
    """As the float32 model with the same, rounded weights: to float32's rounding, not to float16's."""
    monkeypatch.setattr(conversion, "SMALL", 0)
    before = randomised(tiny_config(**FAMILIES[family]), backend="plain").to_checkpoint()
    for part in (before.tokenizer, before.transformer):
        part.update({name: t.half().float() if t.is_floating_point() else t for name, t in part.items()})
    low, full = (Pipeline.from_checkpoint(before, dtype=d, device="cpu") for d in ("float16", "float32"))
    for pipeline in (low, full):
        pipeline.optimize(training=training)
    for name, parameter in low.transformer.named_parameters():
        large = (
            name.endswith("weight")
            and parameter.ndim > 1
            and not any(w in name for w in ("level_embed", "pos_embed", "embedding", "router", "conv"))
        )
        assert parameter.dtype == (torch.float16 if large else torch.float32), name
    config = before.config.transformer
    taus = Thresholds((1.0, 1.0, 0.6, 0.4)) if config.dynamic.experts else None
    labels, tokens = torch.tensor([0, 3, 5]), torch.randint(0, 32, (3, 30), generator=torch.Generator().manual_seed(1))
    logits = []
    for pipeline in (low, full):
        model, inputs = pipeline.transformer, pipeline.tokenizer.teacher_inputs(tokens)
        conditioning, cache = model.embed_condition(labels), model.new_cache(3)
        steps = [
            model.step(
                conditioning, inputs[:, start - 1 : end - 1] if k else None, k, cache, thresholds=taus
            ).logits_BNV
            for k, (start, end) in enumerate(model.pyramid.spans)
        ]
        logits.append(torch.cat(steps, dim=1))
    assert (logits[0] - logits[1]).abs().max() < 2e-5 * logits[1].abs().max()
    images = [pipeline.tokenizer.decode(tokens) for pipeline in (low, full)]
    assert (images[0] - images[1]).abs().max() < 1e-4
    assert low.sample([0, 1], seed=2).tokens.shape == (2, 30)
    assert is_computed_in_float32(low.transformer.head.weight)


# ---- what chooses tokens


@pytest.fixture
def rounded_products():
    """Settings of torch under which float32 products and convolutions are rounded on a CPU, as by TF32 on a GPU."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", ["auto", "plain"])
@torch.no_grad()
def test_tokens_do_not_depend_on_settings_outside(backend, rounded_products):
    """Neither on autocast, nor on torch's precision of float32, nor on the type that the decoder computes in."""
    pipeline = randomised(tiny_config(), backend="plain").optimize(backend)
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = [(place, place.fp32_precision) for place in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]
    inside = set()
    for module in [
        pipeline.tokenizer.quant_conv,
        *pipeline.tokenizer.encoder.modules(),
        *pipeline.tokenizer.quantizer.phi,
    ]:
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda *_: inside.update(place.fp32_precision for place, _ in settings))
    found = pipeline.tokenizer.encode(images)
    assert inside == {"ieee"}
    assert [(place, place.fp32_precision) for place, _ in settings] == settings, "put back"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipeline.tokenizer.encode(images), found)
        canvas = list(pipeline.tokenizer.build_canvases(found))[-1]
    assert torch.equal(pipeline.to("cpu", torch.bfloat16).tokenizer.encode(images), found)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    assert torch.equal(pipeline.tokenizer.encode(images), found)
    assert torch.equal(list(pipeline.tokenizer.build_canvases(found))[-1], canvas)


@pytest.mark.parametrize("by", ["legacy", "precision", "fp32_precision"])
def test_full_float32_on_a_gpu_is_set_and_put_back(by):
    """Whichever way a user has allowed TF32. torch keeps these settings without a GPU, too."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        if by == "legacy":
            matmul.allow_tf32 = True
        elif by == "precision":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        with precision.full_float32(torch.device("cuda")):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", before[1])
        if by != "fp32_precision":
            assert matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_experts_do_not_depend_on_settings_outside(rounded_products):
    model = randomised(tiny_config(experts=ExpertsConfig(router="stmoe")), backend="plain").transformer
    router, x = model.blocks[0].ffn.router, torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    context = ScaleContext(model.pyramid, (0, 30), True, k=3)
    logits = router(x, context).logits_BNM
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(router(x, context).logits_BNM, logits)


# ---- a device without float64


class _NoFloat64(TorchDispatchMode):
    """Raises where an operation gives float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), func
        return out


@pytest.mark.parametrize("family", ["mixture", "dynamic", "mvar"])
def test_no_float64_on_a_device_without_it(family, monkeypatch):
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    pipeline = randomised(tiny_config(**FAMILIES[family]), backend="plain")
    tokens = torch.randint(0, 32, (2, 30))
    records = ("sparsity", "norms", "contribution") if family == "dynamic" else ()
    with _NoFloat64():
        pipeline.sample([0, 1], seed=0, **({"tau": [0.5], "selection": "oracle"} if family == "dynamic" else {}))
        inputs = pipeline.tokenizer.teacher_inputs(tokens)
        pipeline.transformer(torch.tensor([0, 1]), inputs).logits_BNV.sum().backward()
        for record in records:
            pipeline.transformer(torch.tensor([0, 1]), inputs, thresholds=Thresholds((1.0,) * 4, record=record))


# ---- words


def test_types_have_one_name_each_and_short_names_are_understood(tmp_path):
    options = ["--out", "x", "--train.precision", "bf16", "--data", "fp32"]
    command = parse(["train", "cifar10", *options])
    assert command.settings.train.precision == "bfloat16"
    assert command.settings.data == "fp32", "another option's value"
    sample = ["sample", "m", "--labels", "1", "--out", "x.png"]
    assert parse(sample).dtype == "auto"
    assert parse([*sample, "--dtype=fp16"]).dtype == "float16"
    assert parse(["bench", "m", "--dtypes", "fp32", "bf16", "--rounds", "2"]).dtypes == ("float32", "bfloat16")
    (tmp_path / "c.yaml").write_text("train: {precision: fp16, steps: 3}")
    assert parse(["train", str(tmp_path / "c.yaml"), "--out", "x"]).settings.train.precision == "float16"
    assert TrainConfig(precision="bf16").precision == "bfloat16"
    with pytest.raises(UserError, match="precision must be auto, float32, bfloat16 or float16; got 'half'"):
        TrainConfig(precision="half")


def test_records_of_earlier_versions_have_the_same_precision():
    old = {"train": {"precision": "bf16", "steps": 3}, "published": {"precision": 0.85}}
    new = migrate_record(old)
    assert new["train"]["precision"] == "bfloat16"
    assert new["published"] == {"precision": 0.85}
    assert restore_record(new)["train"]["precision"] == "bf16"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "nothing", "meta", "mps" if find_device().type != "mps" else "gpu"])
def test_devices_that_cannot_be_used_are_answered_in_one_line(name):
    with pytest.raises(UserError, match=rf"^device '{name}' cannot be used here: [^\n]{{5,120}}$"):
        find_device(name)


@pytest.mark.parametrize("recorded", ["bf16", "float32", "float16"])
def test_a_run_keeps_the_type_that_auto_chose(recorded, tmp_path):
    config = RunConfig(train=TrainConfig(precision="auto"))
    chosen = get_name(choose_training_dtype("auto", torch.device("cpu")))
    assert resolve_precision(config, tmp_path, World()).train.precision == chosen
    settings = to_dict(config)
    settings["train"]["precision"] = recorded
    (tmp_path / "run.json").write_text(json.dumps(settings))
    kept = resolve_precision(config, tmp_path, World()).train.precision
    assert kept == {"bf16": "bfloat16"}.get(recorded, recorded)
