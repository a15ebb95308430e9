"""Collaborative decoding, token pruning and steps on fixed memory, against plain sampling and brute force."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.pruning import PrunedPredictor, PruningPlan, find_farthest, resize_map
from tests.conftest import randomised, tiny_config

SCALES = "1,2,3,4"


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("scales", [SCALES, "1,2,4,13", "2x1,3x2,4x3"])
def test_a_model_that_refines_itself_draws_what_it_would_have_drawn(scales, cfg):
    pipeline = randomised(tiny_config(scales))
    plain = pipeline.sample([0, 3, None], cfg=cfg, seed=2)
    pipeline.refine_with(pipeline)
    for draft in range(1, len(pipeline.config.pyramid)):
        refined = pipeline.sample([0, 3, None], cfg=cfg, seed=2, draft_scales=draft)
        assert torch.equal(refined.tokens, plain.tokens)


@torch.no_grad()
def test_prefilling_equals_the_full_forward():
    pipeline = randomised(tiny_config("1,2,5,13"))
    model = pipeline.transformer
    values = torch.tensor([0, 4])
    inputs = pipeline.tokenizer.teacher_inputs(torch.randint(0, 32, (2, model.pyramid.length)))
    full, first = model(values, inputs).logits_BNV, model.pyramid.counts[0]
    for begin in range(1, len(model.pyramid)):
        cache, conditioning = model.new_cache(2), model.embed_condition(values)
        for k in range(begin, len(model.pyramid)):
            start, end = model.pyramid.spans[k]
            x = inputs[:, : end - first] if k == begin else inputs[:, start - first : end - first]
            step = model.prefill if k == begin else model.step
            logits = step(conditioning, x, k, cache).logits_BNV
            assert (logits - full[:, start:end]).abs().max() <= 1e-5 * full.abs().max()


def test_a_refiner_draws_the_late_scales_alone(tmp_path):
    large, small = randomised(tiny_config(SCALES)), randomised(tiny_config(SCALES, depth=1, width=16))
    small.tokenizer.load_state_dict(large.tokenizer.state_dict())
    small.save_pretrained(tmp_path / "small")
    plain = large.sample([1, 2], seed=0)
    both = large.sample([1, 2], seed=0, refiner=str(tmp_path / "small"), draft_scales=2)
    start = large.config.pyramid.spans[2][0]
    assert torch.equal(both.tokens[:, :start], plain.tokens[:, :start])
    assert not torch.equal(both.tokens[:, start:], plain.tokens[:, start:])
    assert torch.equal(large.sample([1, 2], seed=0).tokens, plain.tokens), "a refiner stays where none was asked for"
    large.refine_with(large)
    assert torch.equal(large.sample([1, 2], seed=0, draft_scales=2).tokens, plain.tokens)
    again = large.sample([1, 2], seed=0, refiner=str(tmp_path / "small"), draft_scales=2)
    assert torch.equal(again.tokens, both.tokens), "the refiner of the settings, not the one given in between"


@pytest.mark.parametrize("models", ["both", "refiner"])
@pytest.mark.parametrize("tau", [(0.3, 0.6), (0.5,)])
def test_thresholds_hold_for_each_model_with_experts(tau, models):
    """As two models whose checkpoints have these thresholds."""
    if models == "refiner" and len(tau) > 1:
        tau = (1.0, tau[1])  # the main model generates all scales but the last

    def build(seed, tau_of_checkpoint, dynamic=True):
        config = DynamicConfig(4, 2, router_width=8, router_fingerprint="trained", tau=tau_of_checkpoint)
        pipeline = randomised(tiny_config(SCALES, **({"dynamic": config} if dynamic else {})), seed)
        pipeline.tokenizer.load_state_dict(tokenizer)
        return pipeline

    tokenizer = randomised(tiny_config(SCALES)).tokenizer.state_dict()
    each, draft = (tau * 2)[:2], {"draft_scales": 3, "seed": 1}
    stored = build(1, each, models == "both").refine_with(build(2, each))
    given = build(1, (), models == "both").refine_with(build(2, ()))
    images = given.sample([0, 3], tau=tau, **draft)
    assert torch.equal(images.tensor, stored.sample([0, 3], **draft).tensor)
    assert not torch.equal(images.tensor, given.sample([0, 3], **draft).tensor)


def test_thresholds_name_the_model_at_fault():
    dynamic = randomised(tiny_config(SCALES, dynamic=DynamicConfig(experts=4, scales=2)))
    dense = randomised(tiny_config(SCALES))
    dense.tokenizer.load_state_dict(dynamic.tokenizer.state_dict())
    with pytest.raises(UserError, match="this model: this model's routers are not trained"):
        dynamic.refine_with(dense).sample([0], draft_scales=1, tau=(0.5,))
    with pytest.raises(UserError, match="the refiner: this model's routers are not trained"):
        dense.refine_with(dynamic).sample([0], draft_scales=1, tau=(0.5,))
    with pytest.raises(UserError, match="no effect at .*: this model generates this scale"):
        dense.sample([0], draft_scales=3, tau=(0.5, 0.5), selection="oracle")
    with pytest.raises(UserError, match="no effect at .*: the refiner generates this scale"):
        dynamic.sample([0], draft_scales=1, tau=(0.5,), selection="oracle")
    with pytest.raises(UserError, match="divided into experts"):
        dense.refine_with(dense).sample([0], draft_scales=1, tau=(0.5,))
    with pytest.raises(UserError, match="budget cannot be combined with draft_scales"):
        dynamic.sample([0], draft_scales=1, budget=0.9)


def test_editing_takes_turns_as_well():
    pipeline = randomised(tiny_config(SCALES))
    height, width = pipeline.config.image_size
    image, mask = Image.new("RGB", (width, height), "teal"), torch.zeros(height, width)
    mask[:, : width // 2] = 1
    plain = pipeline.edit(image, mask, 1, seed=3).tokens
    pipeline.refine_with(pipeline)
    assert torch.equal(pipeline.edit(image, mask, 1, seed=3, draft_scales=2).tokens, plain)


def test_refiners_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(UserError, match="needs a refiner"):
        tiny.sample([0], draft_scales=2)
    with pytest.raises(UserError, match="codebook differs"):
        randomised(tiny_config(SCALES)).refine_with(randomised(tiny_config(SCALES), seed=1))
    with pytest.raises(UserError, match="scales, tokenizer and classes"):
        randomised(tiny_config(SCALES)).refine_with(randomised(tiny_config("1,2,4")))
    pipeline = randomised(tiny_config(SCALES))
    pipeline.save_pretrained(tmp_path / "same")
    for draft in (0, 4, 9):
        with pytest.raises(UserError, match="draft_scales must be 1 to 3"):
            pipeline.sample([0], refiner=str(tmp_path / "same"), draft_scales=draft)


def test_pruning_nothing_changes_nothing():
    pipeline = randomised(tiny_config(SCALES))
    plain = list(pipeline.sample_scales([1, 2], seed=0))
    none = list(pipeline.sample_scales([1, 2], seed=0, prune=(0.0, 0.0), prune_first_block=0))
    for a, b in zip(plain, none, strict=True):
        assert (a.logits_BNV - b.logits_BNV).abs().max() <= 1e-5 * a.logits_BNV.abs().max()
        assert torch.equal(a.tokens_BN, b.tokens_BN)


def brute_force_attention(attention, x_nD, past_k, past_v):
    """One sequence's attention in float64, token by token; returns the output and the keys and values so far."""
    H, d = attention.heads, attention.head_width
    weight, proj = attention.qkv.weight.double().numpy(), attention.proj
    bias = np.concatenate([attention.q_bias.numpy(), 0 * attention.q_bias.numpy(), attention.v_bias.numpy()])
    q, k, v = ((x_nD @ weight.T + bias).reshape(-1, 3, H, d)[:, i] for i in range(3))
    q = q / np.linalg.norm(q, axis=-1, keepdims=True) * np.exp(attention.log_scale.numpy().reshape(1, H, 1))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    k, v = np.concatenate([past_k, k]), np.concatenate([past_v, v])
    out = np.zeros_like(q)
    for n in range(len(q)):
        for h in range(H):
            scores = np.exp(k[:, h] @ q[n, h])
            out[n, h] = scores @ v[:, h] / scores.sum()
    return out.reshape(len(q), -1) @ proj.weight.double().numpy().T + proj.bias.numpy(), k, v


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@torch.no_grad()
def test_pruned_scales_against_brute_force():
    """FastVAR written out for one sequence, block by block: what is computed, what is repeated, what is cached."""
    pipeline = randomised(tiny_config(SCALES, depth=3))
    model, pyramid = pipeline.transformer, pipeline.config.pyramid
    ratios, first_block = (0.4, 0.5), 1
    values = torch.tensor([2])
    predict = PrunedPredictor(model, values, PruningPlan(pyramid, ratios, first_block))
    conditioning = predict.conditioning
    inputs = pipeline.tokenizer.teacher_inputs(torch.randint(0, 32, (1, pyramid.length)))
    empty = np.zeros((0, model.config.heads, model.config.width // model.config.heads))
    past = [(empty, empty) for _ in model.blocks]
    added: dict[tuple[int, int], np.ndarray] = {}
    for k, (start, end) in enumerate(pyramid.spans):
        x_BNC = inputs[:, start - 1 : end - 1] if k else None
        ours = predict(x_BNC, k).logits_BNV[0].numpy()
        x = model.embed_scale(conditioning, x_BNC, k)[0].double().numpy()
        keep = {2: 9 - int(9 * 0.4), 3: 16 - int(16 * 0.5)}.get(k, end - start)
        for i, block in enumerate(model.blocks):
            for s in range(2):
                gamma, scale, shift = conditioning.blocks_B3SD[i][0, :, s].double().numpy()
                pruned = k >= 2 and i >= first_block
                distance = ((x - x.mean(axis=0)) ** 2).sum(axis=1)
                index = np.argsort(-distance)[:keep] if pruned else np.arange(len(x))
                rows = x[index]
                normal = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-6)
                rows = normal * (1 + scale) + shift
                if s == 0:
                    y, *past[i] = brute_force_attention(block.mixers[0], rows, *past[i])
                else:
                    fc1, fc2 = block.ffn.fc1, block.ffn.fc2
                    hidden = gelu(rows @ fc1.weight.double().numpy().T + fc1.bias.numpy())
                    y = hidden @ fc2.weight.double().numpy().T + fc2.bias.numpy()
                y = y * gamma
                if k == 1:
                    added[i, s] = y
                if pruned:
                    side = pyramid.sides[k][0]
                    whole = np.stack(
                        [area(added[i, s], side, row, column) for row in range(side) for column in range(side)]
                    )
                    whole[index] = y
                    y = whole
                x = x + y
        scale, shift = conditioning.head_B2D[0].double().numpy()
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        logits = (normal * (1 + scale) + shift) @ model.head.weight.double().numpy().T + model.head.bias.numpy()
        assert np.abs(ours - logits).max() <= 1e-5 * np.abs(logits).max(), f"scale {k}"


def area(map_ND, side, row, column):
    """Mean of the cells of a 2x2 map that cell (row, column) of a larger map meets: area interpolation."""
    old = map_ND.reshape(2, 2, -1)
    rows, columns = (range(i * 2 // side, -(-(i + 1) * 2 // side)) for i in (row, column))
    return np.mean([old[r, c] for r in rows for c in columns], axis=0)


def test_the_farthest_tokens_and_a_map_enlarged():
    x = torch.zeros(1, 5, 2)
    x[0, 3], x[0, 1] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, -5.0])
    assert sorted(find_farthest(x, 2).flatten().tolist()) == [1, 3]
    small = torch.arange(4.0).view(1, 4, 1)
    assert resize_map(small, (2, 2), (4, 4)).flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_pruning_that_does_not_fit(tiny):
    for ratios, wrong in (((0.5,) * 4, "the first must be computed whole"), ((1.0,), "shares"), ((-0.1,), "shares")):
        with pytest.raises(UserError, match=wrong):
            tiny.sample([0], prune=ratios)
    with pytest.raises(UserError, match="cannot be combined"):
        SampleConfig(prune=(0.5,), draft_scales=1)
    assert PruningPlan(Pyramid.parse(SCALES), (0.99,), 0).computed[-1] == 1


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_steps_on_fixed_memory_draw_the_same_images(cfg):
    pipeline = randomised(tiny_config(SCALES))
    batches = [[0, 1, 2], [3, None, 1], [4, 4, 4], [1]]
    plain = [pipeline.sample(labels, cfg=cfg, seed=i).tokens for i, labels in enumerate(batches)]
    pipeline.capture()
    for i, labels in enumerate(batches):
        assert torch.equal(pipeline.sample(labels, cfg=cfg, seed=i).tokens, plain[i])
    with pytest.raises(UserError, match="captured steps"):
        pipeline.sample([0], prune=(0.5,))
