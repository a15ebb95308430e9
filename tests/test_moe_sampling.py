"""Sampling from mixtures of experts: the promises of dense models, packed or not, pruned, refined, captured."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.backends import optimize
from nextscale.backends.cpu import products
from nextscale.backends.cpu.experts import PackedStackedLinear
from nextscale.common.errors import UserError
from nextscale.common.registry import ROUTERS
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from nextscale.transformer.feed_forward.experts import Experts, StackedLinear
from tests.conftest import randomised, tiny_config
from tests.test_moe_model import FAMILIES, moe_config, saved
from tests.test_packed import DTYPES, needs_onednn

pytestmark = pytest.mark.usefixtures("seeded")

ROADS = [(False, "float32"), (True, "float32"), (False, "bfloat16"), (True, "bfloat16")]


@pytest.mark.parametrize("router", FAMILIES)
def test_an_image_does_not_depend_on_its_batch(router, threads_set, tmp_path):
    """Bit for bit, alone or beside others, packed or not, in both precisions."""
    threads_set(1)
    folder = saved(moe_config(router, "1,2,4,8"), tmp_path / "model")
    labels = [3, 1, 4, 1, 0]
    for packed, dtype in ROADS:
        pipeline = Pipeline.from_pretrained(folder, dtype=dtype)
        if not packed:
            pipeline = Pipeline.from_checkpoint(pipeline.to_checkpoint(), dtype=dtype)
        alone = pipeline.sample([4], top_k=8, seed=5, first_image=2)
        together = pipeline.sample(labels, top_k=8, seed=5)
        assert torch.equal(alone.tensor[0], together.tensor[2]), "before packing and after it"
        parts = pipeline.sample(labels, top_k=8, seed=5, batch_size=2)
        assert torch.equal(parts.tokens, together.tokens)
        assert torch.equal(parts.tensor, together.tensor)
        others = pipeline.sample([0, 0, 4], top_k=8, seed=5)
        assert torch.equal(others.tensor[2], together.tensor[2])


@pytest.mark.parametrize(("threads", "packed"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("router", FAMILIES)
@torch.no_grad()
def test_logits_do_not_depend_on_the_batch(router, packed, threads, threads_set, tmp_path):
    """The transformer by itself, step by step, bit for bit, at widths at which kernels change how they go."""
    threads_set(threads)
    pipeline = randomised(moe_config(router, "1,2,4,8", width=48, heads=3, ffn_ratio=2.5))
    rng = torch.Generator().manual_seed(1)
    values = torch.tensor([3, 1, 4, 1, 0, 2])
    inputs = [torch.randn(6, n, 4, generator=rng) for n in pipeline.config.pyramid.counts[1:]]
    for dtype in (torch.float32, torch.bfloat16):
        pipeline.to("cpu", dtype)
        model = pipeline.optimize().transformer if packed else pipeline.transformer

        def run(images, model=model):
            conditioning, cache = model.embed_condition(values[images]), model.new_cache(len(values[images]))
            steps = [model.step(conditioning, inputs[k - 1][images] if k else None, k, cache) for k in range(4)]
            return torch.cat([s.logits_BNV for s in steps], dim=1)

        together = run(slice(None))
        for images in ([2], [0, 5], [4, 3, 2, 1])[:: 1 if threads == 1 else 3]:  # two threads wait for busy cores
            assert torch.equal(run(images), together[images]), f"{images} in {dtype}"


@pytest.mark.parametrize("router", FAMILIES)
def test_packed_models_sample_and_save_as_the_plain_ones(router, tmp_path):
    folder = saved(moe_config(router, "1,2,4,8"), tmp_path / "model")
    packed = Pipeline.from_pretrained(folder)
    a = packed.sample([0, 1, 2], seed=3)
    stacks = [m for m in packed.transformer.modules() if isinstance(m, StackedLinear)]
    assert all(m.is_packed for m in stacks) or not products.has_onednn
    packed.save_pretrained(tmp_path / "again")
    for name in ("transformer.safetensors", "tokenizer.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    b = Pipeline.from_pretrained(folder, backend="plain").sample([0, 1, 2], seed=3)
    assert torch.equal(a.tokens, b.tokens)
    assert (a.tensor - b.tensor).abs().max() <= 1e-4


@pytest.mark.parametrize("router", FAMILIES)
def test_captured_steps_edits_and_other_precisions(router):
    plain = randomised(moe_config(router))
    checkpoint = plain.to_checkpoint()
    expected = plain.sample([1, 2, 3], seed=1)
    captured = Pipeline.from_checkpoint(checkpoint).capture()
    for _ in range(2):
        assert torch.equal(captured.sample([1, 2, 3], seed=1).tokens, expected.tokens)
    edited = plain.edit(plain.sample([1]).pil()[0], torch.ones(8, 8), 1)
    assert edited.tensor.isfinite().all()
    for dtype in ("bfloat16", "float16", "float64"):
        assert Pipeline.from_checkpoint(checkpoint, dtype=dtype).sample([1]).tensor.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS.names)
def test_likelihoods_of_a_batch_are_those_of_its_images(router):
    pipeline = randomised(moe_config(router))
    images = torch.rand(3, 3, 8, 8)
    together = pipeline.score(images, [0, 1, None])
    for i, label in enumerate([0, 1, None]):
        assert torch.allclose(pipeline.score(images[i : i + 1], [label])[0], together[i], atol=1e-4)


@pytest.mark.parametrize("first_block", [0, 1, 2])
@pytest.mark.parametrize("router", FAMILIES)
def test_token_pruning(router, first_block):
    """Works, but where a router wants what the block before scored of the same tokens; sharing a batch or not."""
    settings_ = SampleConfig(prune=(0.4, 0.5), prune_first_block=first_block, seed=2)
    pipeline = randomised(moe_config(router, depth=3))
    if router in ("moe++", "capacity"):
        with pytest.raises(UserError, match="prune cannot work with MoE\\+\\+'s gating residual"):
            pipeline.sample([1], settings_)
        pipeline = randomised(moe_config(router, depth=3, residual=False))
    together = pipeline.sample([1, 2, 3], settings_)
    assert together.tensor.isfinite().all()
    assert torch.equal(pipeline.sample([2], settings_, first_image=1).tokens[0], together.tokens[1])


def test_pruning_beside_a_gating_residual_that_it_does_not_reach():
    """Where no pruned block has a block before it that scored other tokens."""
    settings_ = {"prune": (0.4,), "seed": 2}
    pipeline = randomised(moe_config("moe++", depth=2))
    whole = pipeline.sample([1], seed=2)
    assert torch.equal(pipeline.sample([1], prune_first_block=2, **settings_).tokens, whole.tokens)
    assert randomised(moe_config("moe++", depth=1)).sample([1], prune_first_block=0, **settings_).tokens.shape == (
        1,
        30,
    )
    with pytest.raises(UserError, match="sample without prune"):
        pipeline.sample([1], prune_first_block=1, **settings_)


def test_the_whole_share_pruned_is_nothing_pruned():
    """A ratio of 0 leaves every token in, so the picture is that of a model that does not prune."""
    for router in ("stmoe", "smoe", "expert-choice"):
        pipeline = randomised(moe_config(router))
        pruned = pipeline.sample([1, 2], seed=2, prune=(0.0,), prune_first_block=0)
        assert torch.equal(pruned.tokens, pipeline.sample([1, 2], seed=2).tokens), router


@pytest.mark.parametrize("router", ROUTERS.names)
def test_a_mixture_refines_and_is_refined(router, tmp_path):
    """CoDe: it catches up with all scales that another model drew; with itself it changes nothing."""
    dense = randomised(tiny_config(depth=3), seed=1)
    mixture = randomised(moe_config(router))
    with torch.no_grad():
        mixture.tokenizer.load_state_dict(dense.tokenizer.state_dict())
    expected = mixture.sample([1, 2], seed=4)
    again = Pipeline.from_checkpoint(mixture.to_checkpoint())
    for taken in (1, 2, 3):
        itself = mixture.refine_with(again).sample([1, 2], seed=4, draft_scales=taken)
        assert torch.equal(itself.tokens, expected.tokens), f"taken over at scale {taken}"
    refined = dense.refine_with(mixture).sample([1, 2], seed=4, draft_scales=2)
    first = dense.config.pyramid.spans[1][1]
    assert torch.equal(refined.tokens[:, :first], dense.sample([1, 2], seed=4).tokens[:, :first])
    assert not torch.equal(refined.tokens, dense.sample([1, 2], seed=4).tokens)


# ---- stacked weights


@needs_onednn
@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.booleans(),
    st.sampled_from(DTYPES or [0]),
)  # fmt: skip
def test_a_packed_stack_multiplies_as_the_plain_one(count, rows, width, out, gelu, dtype):
    stack, rng = PackedStackedLinear(count, width, out), torch.Generator().manual_seed(rows)
    for parameter in stack.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    before = stack.to(dtype).weight.clone()
    x = torch.randn(rows, width, generator=rng).to(dtype)
    plain = [products.linear(x, stack.weight[j], stack.bias[j], gelu) for j in range(count)]
    stack.pack()
    assert stack.weight.numel() == 0
    for j in range(count):
        y = stack.multiply(x, j, gelu)
        assert torch.equal(y, plain[j]), "packing changed a result"
        exact = F.linear(x.double(), before[j].double(), stack.bias[j].double())
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        assert (y.double() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * max(
            1, exact.abs().max()
        )
        assert torch.equal(stack.multiply(x[:1], j, gelu), y[:1])
    assert torch.equal(stack.state_dict()["weight"], before)
    stack.to(torch.float64)
    assert torch.equal(stack.weight, before.double())
    assert not stack.is_packed


@needs_onednn
def test_a_stack_is_packed_at_the_first_product_that_gains_by_it():
    stack = optimize(torch.nn.ModuleList([StackedLinear(3, 8, 8)]))[0]
    stack(torch.randn(4, 8), 0)
    assert not stack.is_packed
    stack(torch.randn(64, 8), 1)
    assert stack.is_packed


@needs_onednn
def test_a_packed_mixture_refuses_to_be_trained(tmp_path):
    pipeline = Pipeline.from_pretrained(saved(moe_config("stmoe"), tmp_path / "m"))
    with pytest.raises(UserError, match='backend="plain"'):
        pipeline.transformer.train()
    experts = optimize(torch.nn.ModuleList([Experts(3, 8, 16)]))[0]
    with pytest.raises(UserError, match='backend="plain"'):
        experts.train()
    x, gates, mask = torch.randn(64, 8), torch.rand(64, 3), torch.ones(64, 3, dtype=torch.bool)
    experts(x, gates, mask, 192)  # packs
    with pytest.raises(UserError, match='backend="plain"'):
        experts(x.requires_grad_(), gates, mask, 192)
    Pipeline.from_pretrained(tmp_path / "m", backend="plain").transformer.train()
