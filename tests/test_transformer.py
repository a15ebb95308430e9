"""The transformer against a formula written out in NumPy, and its cached passes against its teacher-forced ones."""

import math

import numpy as np
import pytest
import torch

from nextscale.common.errors import UserError
from nextscale.training.transformer import draw_drop_path
from nextscale.transformer.initialization import InitConfig, initialize_transformer
from tests.conftest import randomised, tiny_config

VARIANTS = [
    {},
    {"qk_norm": False},
    {"shared_adaln": True},
    {"ffn_ratio": 2.5, "depth": 1},
]
SCALES = ["1,2,3,4", "4", "2x1,3x2,4x3", "1,1,2,4"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scales", SCALES)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(scales, variant):
    pipeline = randomised(tiny_config(scales, **variant))
    model, tokenizer = pipeline.transformer, pipeline.tokenizer
    tokens = torch.randint(0, 32, (3, model.pyramid.length))
    inputs = tokenizer.teacher_inputs(tokens)
    values = torch.tensor([0, 4, 5])
    full = model(values, inputs).logits_BNV
    conditioning, cache = model.embed_condition(values), model.new_cache(3)
    first = model.pyramid.counts[0]
    for k, (start, end) in enumerate(model.pyramid.spans):
        x = inputs[:, start - first : end - first] if k else None
        step = model.step(conditioning, x, k, cache).logits_BNV
        worst = (step - full[:, start:end]).abs().max() / full.abs().max()
        assert worst <= 1e-5, f"scale {k}: relative difference {worst:.1e}"


@torch.no_grad()
def test_sampling_then_teacher_forcing_gives_the_same_logits():
    pipeline = randomised(tiny_config())
    steps = list(pipeline.sample_scales([1, 2], cfg=0, top_k=0, top_p=0, seed=3))
    tokens = torch.cat([s.tokens_BN for s in steps], dim=1)
    sampled = torch.cat([s.logits_BNV for s in steps], dim=1)
    forced = pipeline.transformer(torch.tensor([1, 2]), pipeline.tokenizer.teacher_inputs(tokens)).logits_BNV
    assert (forced - sampled).abs().max() <= 1e-5 * sampled.abs().max()


@torch.no_grad()
def test_no_scale_sees_a_finer_one():
    pipeline = randomised(tiny_config())
    model, tokens = pipeline.transformer, torch.randint(0, 32, (1, 30))
    before = model(torch.tensor([1]), pipeline.tokenizer.teacher_inputs(tokens)).logits_BNV
    for k, (start, end) in enumerate(model.pyramid.spans):
        changed = tokens.clone()
        changed[:, start:end] = (changed[:, start:end] + 7) % 32
        after = model(torch.tensor([1]), pipeline.tokenizer.teacher_inputs(changed)).logits_BNV
        assert torch.equal(after[:, :end], before[:, :end]), f"tokens of scale {k} reach logits of scale {k} or coarser"
        assert k == len(model.pyramid) - 1 or not torch.equal(after[:, end:], before[:, end:])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense_ffn(q: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    return gelu(y @ q["ffn.fc1.weight"].T + q["ffn.fc1.bias"]) @ q["ffn.fc2.weight"].T + q["ffn.fc2.bias"]


def reference_attention(q: dict[str, np.ndarray], y: np.ndarray, config, visible_LL: np.ndarray) -> np.ndarray:
    """The attention of a block, `q` its parameters."""
    D, H, d = config.width, config.heads, config.width // config.heads
    bias = np.concatenate([q["q_bias"], np.zeros(D), q["v_bias"]])
    qkv = (y @ q["qkv.weight"].T + bias).reshape(len(y), 3, H, d)
    heads = []
    for h in range(H):
        query, key, value = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
        if config.qk_norm:
            query = query / np.linalg.norm(query, axis=-1, keepdims=True)
            key = key / np.linalg.norm(key, axis=-1, keepdims=True)
            query = query * np.exp(min(q["log_scale"][0, h, 0, 0], math.log(100)))
            scores = query @ key.T
        else:
            scores = query @ key.T * 0.25 / math.sqrt(d)
        heads.append(softmax(np.where(visible_LL, scores, -np.inf)) @ value)
    return np.concatenate(heads, axis=-1) @ q["proj.weight"].T + q["proj.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def reference_mamba(q: dict[str, np.ndarray], y: np.ndarray, config) -> np.ndarray:
    """Mamba-2 from facts about `mamba_ssm`: token by token, head by head, `q` its parameters."""
    inner, n, p = config.width * config.mamba.expand, config.mamba.state_width, config.mamba.head_width
    taps, heads = config.mamba.conv_kernel, inner // p
    states, raw, out = np.zeros((heads, p, n)), [np.zeros(inner + 2 * n)] * (taps - 1), []
    for row in y @ q["in_proj.weight"].T:
        z, dt = row[:inner], np.log1p(np.exp(row[-heads:] + q["dt_bias"]))
        raw.append(row[inner:-heads])
        mixed = silu(sum(q["conv1d.weight"][:, 0, j] * raw[j - taps] for j in range(taps)) + q["conv1d.bias"])
        x, B, C = mixed[:inner].reshape(heads, p), mixed[inner : inner + n], mixed[inner + n :]
        value = np.zeros((heads, p))
        for h in range(heads):
            states[h] = states[h] * np.exp(-np.exp(q["A_log"][h]) * dt[h]) + dt[h] * np.outer(x[h], B)
            value[h] = states[h] @ C + q["D"][h] * x[h]
        gated = value.reshape(-1) * silu(z)
        out.append(gated / np.sqrt((gated**2).mean() + 1e-5) * q["norm.weight"])
    return np.array(out) @ q["out_proj.weight"].T


def reference_forward(p: dict[str, np.ndarray], model, label: int, x_LC: np.ndarray, ffn=dense_ffn) -> np.ndarray:
    """VAR for one image in float64, from facts about the official model: no torch, no batch, loops over heads.

    `ffn` computes a block's feed-forward from the block's parameters and its input.
    """
    config, pyramid = model.config, model.pyramid
    D = config.width
    scale_of = np.array(pyramid.scale_of_L)
    condition = p["condition.embedding.weight"][label]
    active = silu(condition)
    first = pyramid.counts[0]
    x = np.concatenate([condition[None] + p["pos_start"][0], x_LC @ p["word_embed.weight"].T + p["word_embed.bias"]])
    x = x + p["level_embed.weight"][scale_of] + p["pos_embed"][0]
    assert x.shape == (first + len(x_LC), D)
    for i in range(config.depth):
        q = {n.removeprefix(f"blocks.{i}."): v for n, v in p.items() if n.startswith(f"blocks.{i}.")}
        mixers = config.block_mixers(i)
        if config.shared_adaln:
            shared = p["shared_adaln.weight"] @ active + p["shared_adaln.bias"]
            vectors = q["adaln.offset"].reshape(-1, D) + shared.reshape(-1, D)
        else:
            vectors = (q["adaln.linear.weight"] @ active + q["adaln.linear.bias"]).reshape(-1, D)
        gammas, scales, shifts = vectors.reshape(3, len(mixers) + 1, D)
        for s, layer in enumerate([*mixers, "ffn"]):
            y = layer_norm(x, config.norm_eps) * (1 + scales[s]) + shifts[s]
            own = {n.removeprefix(f"mixers.{s}."): v for n, v in q.items() if n.startswith(f"mixers.{s}.")}
            if layer == "ffn":
                y = ffn(q, y)
            elif layer == "mamba":
                y = reference_mamba(own, y, config)
            else:
                compare = np.greater_equal if layer == "attention" else np.equal
                y = reference_attention(own, y, config, compare(scale_of[:, None], scale_of[None]))
            x = x + gammas[s] * y
    scale, shift = (p["head_adaln.weight"] @ active + p["head_adaln.bias"]).reshape(2, D)
    x = layer_norm(x, config.norm_eps) * (1 + scale) + shift
    return x @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_against_the_formula(variant):
    pipeline = randomised(tiny_config("1,2x1,3x2", **variant))
    model = pipeline.transformer
    x_BLC = torch.randn(2, model.pyramid.length - 1, 4)
    logits = model(torch.tensor([3, 5]), x_BLC).logits_BNV.double().numpy()
    parameters = {n: t.double().numpy() for n, t in model.state_dict().items()}
    for b, label in enumerate((3, 5)):
        expected = reference_forward(parameters, model, label, x_BLC[b].double().numpy())
        np.testing.assert_allclose(logits[b], expected, atol=2e-5 * np.abs(expected).max())


@torch.no_grad()
def test_a_dropped_branch_contributes_nothing():
    model = randomised(tiny_config("1,2")).transformer
    x = torch.randn(2, 4, 4)
    values = torch.tensor([1, 2])
    nothing = model(values, x, drop_path=torch.zeros(2, 2, 2)).logits_BNV
    everything = model(values, x, drop_path=torch.ones(2, 2, 2)).logits_BNV
    assert torch.equal(everything, model(values, x).logits_BNV)
    for block in model.blocks:
        block.mixers[0].proj.weight.zero_(), block.mixers[0].proj.bias.zero_()
        block.ffn.fc2.weight.zero_(), block.ffn.fc2.bias.zero_()
    assert torch.allclose(nothing, model(values, x).logits_BNV)


def test_stochastic_depth_keeps_the_mean_and_grows_with_depth():
    model = randomised(tiny_config(depth=5)).transformer
    keep = draw_drop_path(model, 4000, 0.4, torch.Generator().manual_seed(0))
    assert keep.shape == (4000, 5, 2)
    assert torch.allclose(keep.mean(dim=0), torch.ones(5, 2), atol=0.05)
    assert torch.allclose((keep == 0).float().mean(dim=(0, 2)), torch.linspace(0, 0.4, 5), atol=0.02)
    assert draw_drop_path(model, 4, 0.0, torch.Generator()) is None


@pytest.mark.parametrize("shared", [False, True])
def test_initialisation_is_var_s(shared):
    model = randomised(tiny_config(depth=4, width=64, shared_adaln=shared)).transformer
    initialize_transformer(model, InitConfig(adaln=0.5, adaln_gamma=1e-3, head=0.02), torch.Generator().manual_seed(1))
    std = math.sqrt(1 / (3 * 64))

    def near(tensor, expected):
        assert abs(tensor.std().item() / expected - 1) < 0.1, (tensor.std().item(), expected)

    block = model.blocks[0]
    near(block.mixers[0].qkv.weight, std)
    near(block.mixers[0].proj.weight, std / math.sqrt(8))
    near(block.ffn.fc2.weight, std / math.sqrt(8))
    near(model.head.weight, 0.02 * std)
    near(model.head_adaln.weight, 0.5 * std)
    near(model.pos_embed, std)
    if shared:
        near(model.shared_adaln.weight, std)
        near(block.adaln.offset[:, :, :2], 1e-3 / 8)
        near(block.adaln.offset[:, :, 2:], 0.5 / 8)
    else:
        near(block.adaln.linear.weight[: 2 * 64], 1e-3 * std)
        near(block.adaln.linear.weight[2 * 64 :], 0.5 * std)
    assert model.head.bias.abs().max() == 0


def test_labels(tiny):
    condition = tiny.transformer.condition
    assert condition.parse([0, 4, None]).tolist() == [0, 4, 5]
    assert condition.add_unconditional(torch.tensor([1])).tolist() == [1, 5]
    assert condition.drop(torch.tensor([True, False]), torch.tensor([1, 2])).tolist() == [5, 2]
    for wrong in (5, -1, 10**12, 1.5):
        with pytest.raises(UserError, match=f"label {wrong} is out of range: this model has 5 classes, 0 to 4"):
            condition.parse([0, wrong])


def test_teacher_inputs_of_the_wrong_length_are_named(tiny):
    with pytest.raises(UserError, match=r"teacher inputs must be \(B, 29, 4\)"):
        tiny.transformer(torch.tensor([1]), torch.zeros(1, 30, 4))


def test_training_after_inference_mode():
    """What is kept between calls must not have been made as an inference tensor."""
    pipeline = randomised(tiny_config("1,2,3,5"))  # a pyramid of this test alone
    inputs = torch.randn(2, 38, pipeline.config.tokenizer.code_width)
    values = torch.tensor([0, 1])
    with torch.inference_mode():
        pipeline.transformer(values, inputs)
    pipeline.transformer.requires_grad_(True)
    pipeline.transformer(values, inputs).logits_BNV.square().mean().backward()
    assert pipeline.transformer.level_embed.weight.grad.abs().max() > 0
