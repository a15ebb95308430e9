"""Linear layers in 8 bits: arithmetic against formulas, whole models against rounded floats, folders, refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nextscale.backends import optimize
from nextscale.backends.cpu.int8 import find_levels
from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels import int8 as kernels
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.cli import main
from nextscale.common.devices import find_device
from nextscale.common.errors import UserError
from nextscale.common.int8 import quantise_weight
from nextscale.common.precision import choose_sampling_dtype
from nextscale.config.transformer import MVAR_MIXERS, DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.pipeline import Pipeline
from nextscale.transformer.feed_forward.experts import StackedLinear
from nextscale.transformer.int8 import Int8Linear, count_int8_layers, quantise_layers, quantise_rows
from nextscale.transformer.var import VAR
from tests.conftest import examples, randomised, tiny_config
from tests.test_independence import FAMILIES as DRAWN
from tests.test_independence import draw_model, sample

FAMILIES = {
    "dense": {},
    "shared": {"shared_adaln": True, "qk_norm": False},
    "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "dynamic": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8)},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(head_width=8, state_width=16)},
}


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """With the compiled kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(build, "load_kernels", lambda *name: None)
    return request.param


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def create_layer(inputs, outputs, bias=True, seed=0):
    model = nn.ModuleDict({"layer": Int8Linear((outputs, inputs), bias)})
    q, scale = quantise_weight(draw(outputs, inputs, seed=seed) * 0.1)
    model["layer"].weight.data, model["layer"].scale.data = q, scale
    if bias:
        model["layer"].bias.data = draw(outputs, seed=seed + 1)
    return model["layer"]


def tanh_gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# ---- arithmetic


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99), st.floats(-5, 5))
def test_weights_are_within_half_a_step(outputs, inputs, seed, power):
    weight = draw(outputs, inputs, seed=seed) * 10**power
    weight[0] = 0
    q, scale = quantise_weight(weight)
    assert (q.dtype, scale.shape) == (torch.int8, (outputs,))
    assert (q[1:].abs().amax(dim=1) == 127).all()
    assert not q[0].any()
    step = scale.double()[:, None]
    assert ((q.double() * step - weight.double()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("levels", [255, 127])
@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.floats(-6, 6))
def test_rows_are_within_half_a_step(levels, count, width, seed, power):
    x = draw(count, width, seed=seed) * 10**power + draw(count, 1, seed=seed + 1)
    x[0] = x[0, 0]
    for function in (quantise_rows, kernels.quantise):
        rows = function(x, levels)
        assert rows.u_RI.dtype == torch.uint8
        u, step, low = rows.u_RI.double().numpy(), rows.scale_R.double().numpy(), rows.low_R.double().numpy()
        assert (low == x.numpy().min(axis=1)).all()
        np.testing.assert_allclose(step * levels, np.ptp(x.double().numpy(), axis=1), rtol=1e-6)
        assert (u <= levels).all()
        error = np.abs(low[:, None] + step[:, None] * u - x.double().numpy())
        assert (error <= step[:, None] * 0.5001 + 1e-6 * np.abs(x.numpy()).max()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_reaches_its_own_row_of_the_output_alone(value, way):
    layer, x = optimize(nn.ModuleList([create_layer(40, 24)]))[0], draw(3, 40)
    x[1, 37] = value
    with torch.no_grad():
        y = layer(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_layer_is_an_exact_sum_of_integers(rows, inputs, outputs, bias, gelu, seed):
    plain, x = create_layer(inputs, outputs, bias, seed), draw(rows, inputs, seed=seed + 2)
    fast, levels = optimize(nn.ModuleList([create_layer(inputs, outputs, bias, seed)]))[0], find_levels()
    for layer, quantised in ((plain, quantise_rows(x)), (fast, kernels.quantise(x, levels))):
        u, q = quantised.u_RI.numpy().astype(np.int64), plain.weight.numpy().astype(np.int64)
        scale, step, low = (t.detach().double().numpy() for t in (plain.scale, quantised.scale_R, quantised.low_R))
        expected = step[:, None] * (u @ q.T * scale) + low[:, None] * (q.sum(axis=1) * scale)
        expected = expected if plain.bias is None else expected + plain.bias.detach().double().numpy()
        with torch.no_grad():
            y = layer.multiply(x, layer.bias, gelu)
        np.testing.assert_allclose(y, tanh_gelu(expected) if gelu else expected, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_a_feed_forward_rounds_its_hidden_units_as_a_layer_rounds_its_inputs(way):
    """Chained in one pass as in two; and a row has the same bits alone and beside thousands, which come in parts."""
    first, second = optimize(nn.ModuleList([create_layer(48, 1024), create_layer(1024, 40, seed=1)]))
    x = draw(3, 1000, 48)
    y = second.multiply_after_gelu(first, x)
    levels, hidden = find_levels(), first.multiply(x[0], first.bias, gelu=True)
    rows = kernels.quantise(hidden, levels)
    exact = rows.scale_R[:, None] * rows.u_RI.float() + rows.low_R[:, None]
    assert (exact - hidden).abs().max() < 0.51 * rows.scale_R.max()
    assert (y[0] - second(hidden)).abs().max() <= 2 * rows.scale_R.max() * second.scale.max() * 127
    assert (y[0] - second(hidden)).square().mean().sqrt() < 1e-3 * y.std()
    for start, stop in ((0, 1), (1, 3), (0, 40), (990, 1000)):
        assert torch.equal(second.multiply_after_gelu(first, x[1, start:stop]), y[1, start:stop])
        assert torch.equal(first(x[1, start:stop]), first(x)[1, start:stop])


def test_levels_are_halved_where_products_would_overflow():
    """oneDNN without VNNI adds two products in 16 bits. The layer then rounds inputs to 127 levels, and stays right."""
    code = (
        "import torch; from tests.test_int8 import *; layer = optimize(nn.ModuleList([create_layer(256, 64)]))[0]\n"
        "x = torch.ones(64, 256); x[:, 0] = 0; layer.weight.data[:] = 127; layer.bias.data[:] = 0\n"
        "with torch.no_grad(): y = layer(x)\n"
        "print(find_levels(), bool((y / (255 * 127 * layer.scale) - 1).abs().max() < 1e-5))"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    levels, right = done.stdout.split()
    assert right == "True"
    assert levels == "127" or "x86" not in os.uname().machine


# ---- models


def round_rows(x):
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    step = ((high - low) / 255).clamp_min(1e-30)
    return low + step * ((x - low) / step).round()


def create_reference(model: VAR) -> VAR:
    """A plain float model whose linear layers round their inputs and have rounded weights."""
    kept = {"word_embed", "router", "fc1", "fc2"} if model.config.dynamic.experts else {"word_embed", "router"}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not kept & set(name.split(".")):
            q, scale = quantise_weight(module.weight)
            module.weight.data = q.float() * scale[:, None]
        elif type(module) is StackedLinear:
            q, scale = quantise_weight(module.weight)
            module.weight.data = q.float() * scale[..., None]
        else:
            continue
        if not name.endswith("qkv"):
            module.register_forward_pre_hook(lambda _, inputs: (round_rows(inputs[0]), *inputs[1:]))
    for block in model.blocks:
        for mixer in block.mixers:
            if hasattr(mixer, "project"):
                mixer.project = lambda x, project=mixer.project: project(round_rows(x))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_computes_what_rounded_floats_do(family):
    """Far closer to them than to the model that is not rounded. All layers but those that must stay are quantised."""
    config = tiny_config(**FAMILIES[family])
    full, rounded, plain, fast = (randomised(config, backend="plain") for _ in range(4))
    create_reference(rounded.transformer)
    plain.to("cpu", torch.int8)
    fast.to("cpu", torch.int8).optimize()
    labels, tokens = torch.tensor([0, 3, 5]), torch.randint(0, 32, (3, 30), generator=torch.Generator().manual_seed(1))
    inputs, models = full.tokenizer.teacher_inputs(tokens), (full, rounded, plain, fast)
    logits = [pipeline.transformer(labels, inputs).logits_BNV for pipeline in models]
    loss = (logits[0] - logits[1]).square().mean().sqrt()
    assert 0 < loss < 0.2 * logits[0].std()
    assert (logits[2] - logits[1]).square().mean().sqrt() < 0.3 * loss
    assert (logits[3] - logits[1]).square().mean().sqrt() < (0.3 if find_levels() == 255 else 3) * loss
    left = [name for name, m in fast.transformer.named_modules() if isinstance(m, nn.Linear)]
    assert all(
        name.startswith("word_embed") or "router" in name or "residual" in name or family == "dynamic" for name in left
    ), left
    assert count_int8_layers(fast.transformer) >= 8


@pytest.mark.parametrize("family", DRAWN)
@torch.no_grad()
def test_an_image_is_the_same_alone_and_in_any_batch(family, way, threads_set):
    """With filters, guidance, smooth codes and thresholds, as tests/test_independence.py draws them."""
    import random

    rng = random.Random(f"int8 {family}")
    config, sampling = draw_model(family, rng)
    pipeline = randomised(config).to("cpu", torch.int8)
    threads_set(rng.choice([1, 2, 3]))
    labels = [0, 3, 1, 4, 2]
    whole = sample(pipeline, labels, 0, sampling)
    for start, stop in ((0, 1), (2, 4)):
        for part, all_of_it in zip(sample(pipeline, labels[start:stop], start, sampling), whole, strict=True):
            assert torch.equal(part, all_of_it[start:stop])


SETTINGS = {
    "schedule": {"cfg": (2.0, 1.0, 0.0, 0.0)},
    "smooth": {"cfg": 1.5, "smooth": True},
    "pruning": {"prune": (0.5,), "prune_first_block": 1},
    "filters": {"top_k": 5, "top_p": 0.8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_settings_compose(name):
    """Until an image's first token that differs, its logits are those of the plain modules to rounding, which is
    coarser where inputs have 127 levels."""
    plain, fast = (randomised(tiny_config(), backend="plain").to("cpu", torch.int8) for _ in range(2))
    fast.optimize()
    labels, tolerance = [1, 4] * 4, 0.02 if find_levels() == 255 else 0.1
    steps = [list(p.sample_scales(labels, seed=1, **SETTINGS[name])) for p in (plain, fast)]
    same_B, compared = torch.ones(len(labels), dtype=torch.bool), 0
    for k, (ours, theirs) in enumerate(zip(*steps, strict=True)):
        error = (ours.logits_BNV - theirs.logits_BNV)[same_B].square().mean().sqrt()
        assert error < tolerance * theirs.logits_BNV.std(), k
        compared += int(same_B.sum())
        same_B &= (ours.tokens_BN == theirs.tokens_BN).all(dim=1)
    assert compared >= 1.5 * len(labels)
    images = [p.sample([1, 4], seed=1, **SETTINGS[name]) for p in (fast, fast)]
    assert torch.equal(images[0].tensor, images[1].tensor)


def test_a_refiner_an_edit_and_scores_take_8_bits(tmp_path):
    folder = tmp_path / "small"
    randomised(tiny_config(depth=1), seed=1).save_pretrained(folder)
    small = Pipeline.from_pretrained(folder)
    base = replace(small.to_checkpoint(), config=tiny_config())
    randomised(tiny_config(), seed=0).save_pretrained(tmp_path / "model")
    base = read_checkpoint(tmp_path / "model")
    shared = replace(base, tokenizer=small.to_checkpoint().tokenizer)
    Pipeline.from_checkpoint(shared).save_pretrained(tmp_path / "model")
    pipeline = Pipeline.from_pretrained(tmp_path / "model", dtype="int8")
    images = pipeline.sample([1, 2], refiner=str(folder), draft_scales=2, seed=3)
    assert pipeline.load_refiner(pipeline._parse_settings(None, {"refiner": str(folder), "draft_scales": 2}))
    assert count_int8_layers(pipeline._refiner) > 0, "the refiner computes in the model's type"
    again = pipeline.sample([2], refiner=str(folder), draft_scales=2, seed=3, first_image=1)
    assert torch.equal(images.tensor[1:], again.tensor)
    full = Pipeline.from_pretrained(tmp_path / "model", dtype="float32")
    nats = [p.score(images, [1, 2]) for p in (pipeline, full)]
    assert not torch.equal(*nats)
    torch.testing.assert_close(*nats, rtol=0.1, atol=1.0)
    mask = np.ones((8, 8), dtype=np.float32)
    mask[:, 4:] = 0
    picture = images.tensor[0].permute(1, 2, 0).numpy()
    edited = [pipeline.edit(picture, mask, 1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(edited[0].tokens, edited[1].tokens)
    assert not torch.equal(edited[0].tokens, edited[2].tokens)


# ---- folders and commands


def test_a_quantised_folder_samples_as_the_model_does_in_8_bits(tiny_folder, tmp_path, capsys):
    folder, grids = tmp_path / "quantised", [tmp_path / "a.png", tmp_path / "b.png"]
    main(["quantise", str(tiny_folder), "--out", str(folder)])
    for model, options, grid in ((folder, [], grids[0]), (tiny_folder, ["--dtype", "int8"], grids[1])):
        main(["sample", str(model), "--labels", "0,3", "--out", str(grid), *options])
    assert grids[0].read_bytes() == grids[1].read_bytes()
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.dtype == torch.int8
    pipeline.sample([0])  # which packs the weights
    pipeline.save_pretrained(tmp_path / "again")
    for name in ("transformer.safetensors", "tokenizer.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = ((f / "transformer.safetensors").stat().st_size for f in (tiny_folder, folder))
    assert after < before / 2, "of so narrow a model half is embeddings, biases and names"
    capsys.readouterr()
    main(["info", str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights"] == "int8"
    assert facts["weight_bytes"] == after + (folder / "tokenizer.safetensors").stat().st_size
    main(["info", str(folder)])
    main(["info", str(folder), "--verify"])
    assert "3 files match their digests" in capsys.readouterr().out


def test_linear_layers_take_a_quarter_of_the_bytes():
    model = randomised(tiny_config(), backend="plain").transformer
    names = [n for n, t in model.state_dict().items() if n.endswith(".weight") and "embed" not in n]
    before = {name: model.state_dict()[name].nbytes for name in names}
    after = quantise_layers(model).state_dict()
    quantised = [name for name in names if after[name].dtype == torch.int8]
    assert len(quantised) >= 10
    assert all(after[name].nbytes * 4 == before[name] for name in quantised)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("upcycle FOLDER --out new", "use the model that `nextscale quantise` made it from"),
        ("adapt FOLDER --classes 3 --out new", "linear layers in int8"),
        ("export-official FOLDER --var new.safetensors", "linear layers in int8"),
        ("quantise FOLDER --out new", "linear layers in int8"),
        ("sample FOLDER --labels 1 --out new.png --dtype float32", "turned back to float32"),
        ("sample FOLDER --labels 1 --out new.png --device cuda", "cuda"),
    ],
)
def test_what_8_bits_cannot_do_is_refused(command, part, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["quantise", str(tiny_folder), "--out", "quantised"])
    assert main(command.replace("FOLDER", "quantised").split()) != 0
    assert part in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantised"]


def test_damaged_quantised_folders_are_refused(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    Pipeline.from_pretrained(tiny_folder, dtype="int8").save_pretrained(folder)
    head = json.loads((folder / "config.json").read_text())
    del head["digest"]
    for weights, part in ((None, "unknown tensor"), ("int4", "weights must be 'int8' or missing, got 'int4'")):
        (folder / "config.json").write_text(json.dumps({**head, "weights": weights}))
        with pytest.raises(UserError, match=part):
            Pipeline.from_pretrained(folder)
    plain = json.loads((tiny_folder / "config.json").read_text())
    del plain["digest"]
    (folder / "config.json").write_text(json.dumps({**plain, "weights": "int8"}))
    (folder / "transformer.safetensors").write_bytes((tiny_folder / "transformer.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"missing tensor .*scale"):
        Pipeline.from_pretrained(folder)


def test_8_bits_are_for_inference_on_a_cpu_and_never_chosen(tiny_folder):
    assert choose_sampling_dtype("auto", find_device("cpu"), 1920) != torch.int8
    tokenizer = Pipeline.from_pretrained("models/tokenizer-cifar10")
    with pytest.raises(UserError, match="is a tokenizer alone"):
        tokenizer.to("cpu", torch.int8)
    pipeline = Pipeline.from_pretrained(tiny_folder, dtype="int8")
    with pytest.raises(UserError, match="cannot be turned back to float32"):
        pipeline.to("cpu", torch.float32)
    with pytest.raises(UserError, match="cannot be converted to bfloat16"):
        pipeline.transformer.bfloat16()
    with pytest.raises(UserError, match="on a CPU alone, not on cuda"):
        pipeline.to("cuda", torch.int8)
    for backend in ("plain", "auto"):
        with pytest.raises(UserError, match="cannot be trained"):
            Pipeline.from_checkpoint(read_checkpoint(tiny_folder), dtype="int8", backend=backend).transformer.train()
    layer = create_layer(8, 8)
    for module in (layer, optimize(nn.ModuleList([create_layer(8, 8)]))[0]):
        with pytest.raises(UserError, match="give no gradients"):
            module(torch.ones(2, 8, requires_grad=True))


def test_a_quantised_folder_with_dynamic_experts_keeps_its_routers_and_thresholds(tmp_path):
    model = randomised(tiny_config(**FAMILIES["dynamic"])).to_checkpoint()
    print_of_ffns = compute_router_fingerprint(model.transformer, model.config.transformer)
    dynamic = replace(model.config.transformer.dynamic, router_fingerprint=print_of_ffns, tau=(0.6, 0.3))
    config = replace(model.config, transformer=replace(model.config.transformer, dynamic=dynamic))
    Pipeline.from_checkpoint(replace(model, config=config)).save_pretrained(tmp_path / "model")
    assert main(["quantise", str(tmp_path / "model"), "--out", str(tmp_path / "quantised")]) == 0
    pipeline = Pipeline.from_pretrained(tmp_path / "quantised")
    steps = list(pipeline.sample_scales([1, 2], seed=0))
    active = [record.activity for step in steps for record in step.records if record and record.activity]
    assert active, "experts were selected"
    images = [pipeline.sample([1, 2], seed=0, **settings) for settings in ({}, {"tau": (1.0, 1.0)})]
    assert not torch.equal(images[0].tensor, images[1].tensor)
