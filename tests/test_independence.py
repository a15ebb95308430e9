"""An image does not depend on its batch, to the last bit: models of all kinds and of odd sizes, on one to four threads.

A few models here; `make soak` draws more (NEXTSCALE_SOAK=24). A fault shows at sizes that fill no vector, where threads
divide an image's values, and where one image is too little work for all threads.
"""

import copy
import math
import os
import random
from dataclasses import replace

import pytest
import torch

from nextscale.backends import optimize
from nextscale.backends.cpu.activations import CpuSiLU, CpuTokenizerSiLU, compute_gelu
from nextscale.backends.cpu.kernels import build
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.tokenizer.autoencoder import MapAttention
from tests.conftest import randomised, tiny_config

MODELS = int(os.environ.get("NEXTSCALE_SOAK", 1))
FAMILIES = ("dense", "mixture", "dynamic", "mamba")
SCALES = "1,2,3,4", "1,2,4,8", "1,2,3,5,9", "1,2,12", "1,3,7,16", "1,4,10,13"


def draw_model(family, rng):
    """A config and settings of sampling."""
    heads, head_width = rng.choice([1, 2, 3]), rng.choice([8, 16, 24, 32, 64])
    tokenizer = TokenizerConfig(
        vocab_size=rng.choice([32, 100, 1000]), code_width=rng.choice([4, 6, 32]), res_blocks=1,
        base_channels=rng.choice([8, 16, 24, 40]), channel_multipliers=rng.choice([(1,), (1, 1), (1, 1, 2)]),
        norm_groups=rng.choice([1, 4, 8]),
    )  # fmt: skip
    fields = {"width": heads * head_width, "heads": heads, "qk_norm": rng.random() < 0.5}
    settings = {"top_k": rng.choice([0, 8]), "top_p": rng.choice([0.0, 0.9]), "smooth": rng.random() < 0.3}
    if family == "mixture":
        router = rng.choice(["stmoe", "smoe", "expert-choice", "moe++"])
        more = {"renormalise": rng.random() < 0.5, "capacity_factor": 0.7 * (rng.random() < 0.5)}
        fields["experts"] = ExpertsConfig(router=router, count=4, active=2, **more)
    if family == "dynamic":
        width, activation = rng.choice([8, 24, 100]), rng.choice(["gelu", "relu"])
        made = {"activation": activation, "router_width": width, "router_fingerprint": "trained"}
        fields["dynamic"] = DynamicConfig(experts=rng.choice([4, 8]), scales=2, **made)
        kinds = ["threshold", "top-k", "cumulative", "random", "oracle", "pruned", "pruned-activation"]
        settings |= {"tau": (rng.choice([0.3, 0.8]), rng.choice([0.2, 0.9])), "selection": rng.choice(kinds)}
    if family == "mamba":
        fields["mixers"] = "scale-attention", "mamba"
        fields["mamba"] = MambaConfig(state_width=rng.choice([8, 20]), head_width=8)
    fields["shared_adaln"] = rng.random() < 0.3
    return replace(tiny_config(rng.choice(SCALES), **fields), tokenizer=tokenizer), settings


def sample(pipeline, labels, first, settings):
    """Logits and canvas of every scale, and the images."""
    steps = list(pipeline.sample_scales(labels, first_image=first, seed=3, **settings))
    parts = [part for step in steps for part in (step.logits_BNV, step.canvas_BChw)]
    return [*parts, pipeline.tokenizer.decode_canvas(steps[-1].canvas_BChw)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_image_is_the_same_alone_and_in_any_batch(family, compiled, threads_set, monkeypatch):
    if not compiled:
        monkeypatch.setattr(build, "load_kernels", lambda *name: None)
    for number in range(2 * MODELS):
        rng = random.Random(f"{family} {number}")
        config, settings = draw_model(family, rng)
        pipeline = randomised(config, number)
        if rng.random() < 0.25:
            pipeline.to("cpu", torch.bfloat16)
        threads_set(rng.choice([1, 2, 3, 4]))
        labels = [rng.randrange(5) for _ in range(rng.choice([2, 3, 5, 9]))]
        whole = sample(pipeline, labels, 0, settings)
        for size in (1, 2):
            start = rng.randrange(len(labels) - size + 1)
            parts = sample(pipeline, labels[start : start + size], start, settings)
            for name, (part, all_of_it) in enumerate(zip(parts, whole, strict=True)):
                assert torch.equal(part, all_of_it[start : start + size]), f"{number}: tensor {name} of {len(whole)}"


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_activations_of_equal_values_are_equal_wherever_they_stand(count, compiled, threads_set, monkeypatch):
    threads_set(count)
    if not compiled:
        monkeypatch.setattr(build, "load_kernels", lambda *name: None)
    for value in torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist():
        for width in (7, 96, 3001):
            y = compute_gelu(torch.full((50000 // width, width), value))
            assert (y == y[0, 0]).all()
            expected = 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
            assert y[0, 0].item() == pytest.approx(expected, rel=2e-5, abs=1e-6)
    x = torch.randn(5, 11, 37, 41, generator=torch.Generator().manual_seed(0))
    for silu in (CpuSiLU(), CpuTokenizerSiLU()):
        whole = silu(x.clone())
        torch.testing.assert_close(whole, torch.nn.functional.silu(x))
        for i in range(5):
            assert torch.equal(silu(x[i : i + 1].clone())[0], whole[i])


@pytest.mark.parametrize("channels", [8, 24, 32, 40, 64, 160])
@torch.no_grad()
def test_attention_over_a_map_of_odd_sides_does_not_depend_on_the_batch(channels, threads_set):
    """Where images begin at no multiple of 64 bytes."""
    layer = MapAttention(channels, 4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    fast = optimize(torch.nn.Sequential(copy.deepcopy(layer)), "auto")
    for count in (1, 2, 3):
        threads_set(count)
        for h, w in ((5, 5), (3, 5), (7, 7), (9, 13)):
            x = torch.randn(4, channels, h, w, generator=torch.Generator().manual_seed(h * w))
            whole = fast(x)
            torch.testing.assert_close(whole, layer(x), rtol=1e-4, atol=1e-4)
            for i in range(4):
                assert torch.equal(fast(x[i : i + 1].clone())[0], whole[i]), f"{h}x{w}, {count} threads, image {i}"
