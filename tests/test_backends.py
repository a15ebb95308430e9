"""Every fast twin computes what its plain module does: one table of cases, which must name every twin."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from nextscale.backends.twins import CUDA, DECODER_CPU, INFERENCE_CPU, TRAINING_CPU, optimize, swap_module
from nextscale.common.precision import Float32Linear
from nextscale.config.lora import LoraConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, TransformerConfig
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.tokenizer import autoencoder
from nextscale.tokenizer.autoencoder import Decoder, Downsample, MapAttention, Upsample
from nextscale.tokenizer.int8 import Int8Conv2d, Int8Upsample
from nextscale.tokenizer.quantizer import Phi, Quantizer
from nextscale.transformer.attention import Attention
from nextscale.transformer.block import AdaLayerNorm, GatedResidual
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.cross_attention import CrossAttention
from nextscale.transformer.feed_forward import DenseFeedForward
from nextscale.transformer.feed_forward.dynamic import DynamicFeedForward, ExpertRouter
from nextscale.transformer.feed_forward.experts import Experts, StackedLinear
from nextscale.transformer.feed_forward.mixture import ZeroComputationExperts
from nextscale.transformer.feed_forward.thresholds import Thresholds
from nextscale.transformer.int8 import Int8Linear, Int8StackedLinear, quantise_layers
from nextscale.transformer.lora import LoraLinear, LoraStackedLinear, adapt_layer
from nextscale.transformer.mamba import Mamba2
from nextscale.transformer.scale_attention import ScaleAttention
from tests.conftest import randomised, tiny_config

PYRAMID = Pyramid.parse("1,2,3,8,13")
MOE = ExpertsConfig(router="moe++", count=4, active=2)
CONFIG = TransformerConfig(depth=2, width=32, heads=4, experts=MOE)
DYNAMIC = TransformerConfig(depth=1, width=32, heads=4, dynamic=DynamicConfig(experts=4, scales=2, router_width=8))
CODES = TokenizerConfig(vocab_size=24, code_width=4, base_channels=8, channel_multipliers=(1, 1), norm_groups=4)
WHOLE = ScaleContext(PYRAMID, (0, PYRAMID.length), True, k=4, thresholds=Thresholds((1.0, 1.0, 1.0, 0.6, 0.3)))
STEP = ScaleContext(PYRAMID, PYRAMID.spans[3], k=3, thresholds=Thresholds((1.0, 1.0, 1.0, 0.6, 0.3)))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask():
    return torch.rand(90, 4, generator=torch.Generator().manual_seed(1)) < 0.5


def run_mixer(layer):
    """All scales at once, and one scale after those before it."""
    x, state = draw(2, PYRAMID.length, 32), layer.new_state(2, PYRAMID.spans[-1][0])
    outputs = [layer(x, WHOLE, None)]
    if torch.is_grad_enabled():  # states are written in place
        return outputs[0]
    for k, (start, end) in enumerate(PYRAMID.spans):
        outputs.append(layer(x[:, start:end], ScaleContext(PYRAMID, (start, end), k=k), state))
    return torch.cat(outputs, dim=1)


def run_quantizer(layer):
    z, probability = draw(2, 9, 4), draw(2, 9, 24).softmax(dim=-1)
    nearest = nn.functional.one_hot(layer.find_nearest(z), 24).float()
    return torch.cat([layer.mix_codes(probability), nearest, layer.upsample_codes(z, 2).flatten(2).mT[:, :9]], dim=-1)


def create_int8_layer():
    return quantise_layers(DenseFeedForward(TransformerConfig(width=24, heads=4))).fc1


def create_int8_experts():
    return quantise_layers(Experts(4, 24, 40)).fc1


def adapted(layer):
    return adapt_layer(layer, LoraConfig(rank=3), torch.Generator())


def run_cross_attention(mixer):
    """Three images with sequences of different lengths."""
    mask_BT = torch.arange(5) < torch.tensor([[2], [5], [3]])
    return mixer(draw(3, 9, 32), None, mixer.read_sequence(draw(3, 5, 32, seed=1), mask_BT))


CASES = {
    nn.Linear: (lambda: nn.Linear(24, 40), lambda m: m(draw(3, 50, 24))),
    Int8Linear: (create_int8_layer, lambda m: m((draw(3, 50, 24) > 0).float())),  # exact in 127 levels, too
    LoraLinear: (lambda: adapted(nn.Linear(24, 40)), lambda m: m(draw(3, 50, 24))),
    LoraStackedLinear: (
        lambda: adapted(StackedLinear(4, 24, 40)), lambda m: torch.cat([m(draw(90, 24), j) for j in range(4)])
    ),
    Int8StackedLinear: (
        create_int8_experts, lambda m: torch.cat([m((draw(90, 24) > 0).float(), j) for j in range(4)]),
    ),
    Int8Conv2d: (lambda: Int8Conv2d(8, 12, 3, padding=1), lambda m: m((draw(2, 8, 11, 6) > 0).float())),
    Int8Upsample: (lambda: Int8Upsample(8), lambda m: m((draw(2, 8, 5, 6) > 0).float())),
    Float32Linear: (lambda: Float32Linear(24, 40), lambda m: m(draw(3, 50, 24))),
    nn.Conv2d: (lambda: nn.Conv2d(8, 12, 3, padding=1), lambda m: m(draw(2, 8, 70, 66))),
    Downsample: (lambda: Downsample(8), lambda m: m(draw(1, 8, 12, 12))),
    Upsample: (lambda: Upsample(8), lambda m: m(draw(2, 8, 40, 36))),
    nn.SiLU: (nn.SiLU, lambda m: m(draw(3, 5, 7))),
    autoencoder.SiLU: (autoencoder.SiLU, lambda m: m(draw(3, 5, 7))),
    MapAttention: (lambda: MapAttention(8, 4), lambda m: m(draw(3, 8, 9, 9))),
    Phi: (lambda: Phi(4, 0.5), lambda m: m(draw(1, 4, 9, 9))),
    Decoder: (lambda: Decoder(CODES), lambda m: m(draw(3, 4, 8, 8))),
    Quantizer: (lambda: Quantizer(CODES, PYRAMID), run_quantizer),
    GatedResidual: (GatedResidual, lambda m: m(draw(2, 9, 32), draw(2, 9, 32, seed=1), draw(2, 1, 32, seed=2))),
    AdaLayerNorm: (lambda: AdaLayerNorm(1e-6), lambda m: m(draw(2, 9, 32), draw(2, 1, 32), draw(2, 1, 32, seed=1))),
    Attention: (lambda: Attention(CONFIG), run_mixer),
    ScaleAttention: (lambda: ScaleAttention(CONFIG), run_mixer),
    CrossAttention: (lambda: CrossAttention(CONFIG), run_cross_attention),
    Mamba2: (lambda: Mamba2(CONFIG), run_mixer),
    DenseFeedForward: (lambda: DenseFeedForward(CONFIG), lambda m: m(draw(2, 60, 32), WHOLE)[0]),
    StackedLinear: (lambda: StackedLinear(4, 24, 40), lambda m: torch.cat([m(draw(90, 24), j) for j in range(4)])),
    Experts: (lambda: Experts(4, 32, 64), lambda m: m(draw(90, 32), draw(90, 4), mask(), 360)),
    ZeroComputationExperts: (
        lambda: ZeroComputationExperts(MOE, 32), lambda m: m(draw(2, 9, 32), draw(2, 9, MOE.zero_computation))
    ),
    DynamicFeedForward: (
        lambda: DynamicFeedForward(DYNAMIC, 5),
        lambda m: torch.cat([m(draw(2, PYRAMID.length, 32), WHOLE)[0], m(draw(2, 64, 32), STEP)[0]], dim=1),
    ),
    ExpertRouter: (
        lambda: ExpertRouter(32, 8, 4),
        lambda m: torch.cat([m(draw(90, 32)), m.select(draw(90, 32), 0.5, "threshold").float()]),
    ),
}  # fmt: skip
"""Plain class -> (how to make one, its results on fixed inputs)."""

TABLES = {"training": TRAINING_CPU, "inference": INFERENCE_CPU, "decoder": DECODER_CPU, "cuda": CUDA}
ENTRIES = [(table, plain, fast) for table, twins in TABLES.items() for plain, fast in twins.items()]


def load(path):
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def make(plain):
    module, rng = CASES[plain][0](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5)
    return module


@pytest.mark.parametrize(("table", "plain", "fast"), ENTRIES, ids=lambda x: x.rpartition(":")[2])
def test_a_twin_names_its_plain_module_and_computes_the_same(table, plain, fast):
    assert load(fast).plain is load(plain)
    assert issubclass(load(fast), load(plain))
    module, run = make(load(plain)), CASES[load(plain)][1]
    holder = nn.ModuleList([copy.deepcopy(module)])
    holder[0] = swap_module(holder[0], {plain: fast})
    if table in ("training", "inference"):
        optimize(holder, training=table == "training")
    assert type(holder[0]) is load(fast)
    with torch.no_grad():
        for _ in range(2):  # the first call may pack weights
            assert_near(run(holder[0]), run(module))
    assert {n: t.shape for n, t in holder[0].state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }
    if table in ("inference", "decoder"):
        return
    gradients = []
    for layer in (holder[0], module):
        result = run(layer)
        if not result.requires_grad:
            return
        (result * draw(*result.shape, seed=3)).sum().backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert_near(gradients[0][name], gradient)


def assert_near(ours, theirs):
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= 2e-5 * max(theirs.abs().max().item(), 1), difference


def test_every_twin_has_a_case():
    assert {load(plain) for _, plain, _ in ENTRIES} == set(CASES)


FAMILIES = {
    "dense": {},
    "mixture": {"experts": MOE},
    "mvar": {"mixers": ("scale-attention", "mamba")},
    "dynamic": {"dynamic": DynamicConfig(experts=4, scales=2, router_width=8)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_on_both_backends(family, tmp_path):
    """Tokens are equal and pictures alike; the folder that an optimised pipeline saves is the one that it loaded."""
    randomised(tiny_config(**FAMILIES[family])).save_pretrained(tmp_path / "model")
    plain, fast = (Pipeline.from_pretrained(tmp_path / "model", backend=backend) for backend in ("plain", "auto"))
    settings = {"tau": (0.6, 0.3), "selection": "oracle"} if family == "dynamic" else {}
    images = [pipeline.sample([0, 1, 4], seed=2, **settings) for pipeline in (plain, fast)]
    assert torch.equal(images[0].tokens, images[1].tokens)
    assert_near(images[1].tensor, images[0].tensor)
    assert not any(p.requires_grad for p in fast.transformer.parameters())
    assert all(p.requires_grad for p in plain.transformer.parameters())
    plain.transformer.train()
    for name, pipeline in (("a", plain), ("b", fast)):
        pipeline.save_pretrained(tmp_path / name)
    for file in ("transformer.safetensors", "tokenizer.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_module_in_two_places_stays_one_module():
    layer = nn.Linear(4, 4)
    model = optimize(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}), training=True)
    assert model["a"] is model["b"][0]
    assert model["a"].weight is layer.weight


def test_loading_a_model_changes_nothing_of_the_process(tiny_folder):
    import os

    before = dict(os.environ)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    Pipeline.from_pretrained(tiny_folder).sample([0])
    assert dict(os.environ) == before
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)


def test_a_module_of_your_own_keeps_weights_that_it_can_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x) @ self.layer.weight

    plain, x = Tied(), draw(64, 32)
    fast = optimize(nn.ModuleList([copy.deepcopy(plain)]))[0]
    with torch.no_grad():
        for _ in range(2):
            assert_near(fast(x), plain(x))
